"""Triton kernels, one file per op, installed as ``fasticl.kernels``. None yet: CUDA tensors run the reference."""
