"""Numerics without parameters: attention kernels and matrix products."""
