"""bfloat16 where it is the faster type."""

import torch

from apt_dense.runtime import multiplies_bfloat16


def fast_type(device: str) -> torch.dtype:
    """The faster type for products on a type of device: bfloat16 on GPUs and on CPUs with AVX512_BF16 or AMX, else
    float32."""
    return torch.bfloat16 if device == "cuda" or (device == "cpu" and multiplies_bfloat16()) else torch.float32


def in_16_bits(device: str) -> torch.autocast:
    """A context in which layers on a type of device compute in its ``fast_type``."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_type(device) == torch.bfloat16)
