"""Proposers that draft with a trained head; `specdec.heads` holds the heads."""
