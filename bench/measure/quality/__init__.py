"""Scoring outputs: answers of data sets, and generated code in a sandbox."""
