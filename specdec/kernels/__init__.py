"""Kernels for CPUs in C++ (`cpp`) and for GPUs in Triton (`gpu` says where they run)."""
