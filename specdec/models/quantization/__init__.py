"""Weights in 8 or 4 bits for the kernels of this CPU: how they are rounded, and models that have them."""
