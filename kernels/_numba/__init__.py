"""Numba forms of the operations in ``kernels``, for CPUs; imported on first use."""
