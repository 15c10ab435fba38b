"""Modules of a base on the compiled kernels, or in fp32 without them."""
