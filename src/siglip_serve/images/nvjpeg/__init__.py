"""Decode JPEG files on NVIDIA GPUs."""
