"""Towers run on NVIDIA GPUs by fused kernels and CUDA graphs."""
