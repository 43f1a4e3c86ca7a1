"""Attention kernels, one file each, all with the signature of :func:`apt_dense.attention.packed_attention`."""
