"""The operands of attention kernels, and the form in which a kernel says where it runs.

Shape letters: R packed rows, H heads, D channels of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.layout.tokens import Segments
from apt_dense.ops.bias import PaddingKey, RelativeBias


class Inputs(NamedTuple):
    """The operands of attention inside segments."""

    q: Tensor  # (R, H, D), the rows of all segments one after the other
    k: Tensor  # (R, H, D)
    v: Tensor  # (R, H, D)
    segments: Segments  # of R rows in all
    bias: RelativeBias | None = None  # added to the scaled logits
    padding: PaddingKey | None = None  # an extra key of each segment
    logit_R: Tensor | None = None  # added to the logits that all queries have for each key; a constant, no gradient

    @property
    def has_terms(self) -> bool:
        """Check whether logits are more than scaled dot products."""
        return self.bias is not None or self.padding is not None or self.logit_R is not None

    @property
    def trains(self) -> bool:
        """Check whether gradients are wanted; inside of torch.func, where tensors do not tell, say yes."""
        if torch._C._are_functorch_transforms_active():
            return True
        tensors = (self.q, self.k, self.v) if self.bias is None else (self.q, self.k, self.v, self.bias.queries_RHK)
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class Kernel(NamedTuple):
    """An implementation of softmax attention inside segments: (R, H, D) out of :class:`Inputs`."""

    run: Callable[[Inputs], Tensor]
    obstacle: Callable[[Inputs], str | None]  # why it cannot run; None if it can
    suits: Callable[[Inputs], bool]  # whether "auto" takes it, if it can run and no kernel before it was taken
