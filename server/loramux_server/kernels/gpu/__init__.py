"""Kernels in Triton for graphics processors. They need Triton, which PyTorch brings only where there is CUDA."""
