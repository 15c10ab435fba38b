"""A whole step of a decoder, made of the kernels beside it."""
