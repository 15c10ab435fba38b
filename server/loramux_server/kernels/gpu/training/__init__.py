"""A base on the NF4 kernels in training: the products that are served, and their gradients."""
