"""Models with weights in 8 or 4 bits for the CPU kernels, and the quantizers that round these weights."""
