"""Kernels compiled for a GPU that is not there, and what their machine code says about their speed."""
