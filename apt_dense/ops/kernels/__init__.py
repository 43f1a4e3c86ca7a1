"""Attention kernels: one a file, all with the signature in ``interface.py``; ``ops/attention.py`` lists them."""
