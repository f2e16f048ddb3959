"""Instruments that prove a speculative engine lossless, or show where it is not."""
