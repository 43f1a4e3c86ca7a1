"""bfloat16 where it is the faster type."""

import torch

from apt_dense.runtime import multiplies_bfloat16


def in_16_bits(device: str) -> torch.autocast:
    """A context in which layers on a type of device compute in bfloat16 if it multiplies faster in that than in
    float32: GPUs, and CPUs with AVX512_BF16 or AMX."""
    fast = device == "cuda" or (device == "cpu" and multiplies_bfloat16())
    return torch.autocast(device, torch.bfloat16, enabled=fast)
