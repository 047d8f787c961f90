"""The device: rounding as its hardware does it, and the launching of kernels."""
