"""Proposers draft tokens; one module for each."""
