"""Triton kernels, one file per op, installed as ``fasticl.kernels``: ``launch`` takes what the op's reference takes.

Importing a kernel imports Triton; the ops do so at the first call with CUDA tensors.
"""
