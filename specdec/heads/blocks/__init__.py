"""Heads that draft a block in one pass, DFlash and its variants."""
