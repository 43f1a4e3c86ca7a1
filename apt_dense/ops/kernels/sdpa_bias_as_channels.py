"""Attention by PyTorch's fused kernel on batches of segments, the bias as further channels of q and k. Runs everywhere.

Nothing of the size of the scores is made, in the backward pass neither. Shape letters as in length_buckets.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.ops.bias import augment, mask_factor
from apt_dense.ops.kernels.interface import Inputs, Kernel
from apt_dense.ops.kernels.length_buckets import Batch, attend_by_bucket


def sdpa(inputs: Inputs) -> Tensor:
    return attend_by_bucket(inputs, _augmented)


def _augmented(batch: Batch) -> Tensor:
    q, k, v, queries, keys, valid, logits = batch
    width = q.shape[-1]
    if logits is not None:
        queries, keys = F.pad(queries, (0, 1), value=1.0), torch.cat([keys, logits[..., None]], -1)
    if valid is not None:  # one more channel, which masks padded places
        factor = mask_factor(q.dtype)
        masked = F.pad(torch.where(valid, 0.0, factor).to(q.dtype), (0, k.shape[1] - valid.shape[1]))
        queries, keys = F.pad(queries, (0, 1), value=-factor), torch.cat([keys, masked[..., None]], -1)
    q, k, v = (t.transpose(1, 2) for t in augment(q, k, v, queries, keys))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)[..., :width]


def _suits(inputs: Inputs) -> bool:
    """Check whether the segments are a plain batch. On an H200, cuDNN's kernel took half the time of the varlen one for
    heads of 192 channels."""
    return inputs.segments.is_even and (not inputs.has_terms or inputs.q.is_cuda)


KERNEL = Kernel(sdpa, lambda inputs: None, _suits)
