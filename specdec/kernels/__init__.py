"""Kernels for CPUs in C++ (`cpp`) and for GPUs in Triton (`gpu` selects them by device)."""
