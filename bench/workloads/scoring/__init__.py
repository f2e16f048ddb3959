"""Scoring: the answer in an output, and the programs that check code."""
