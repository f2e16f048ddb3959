"""Proposers: what drafts tokens, a module each."""
