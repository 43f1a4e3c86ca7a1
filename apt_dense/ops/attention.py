"""Attention over packed segments: the registry of kernels, and the choice among them.

| backend | where | relative positions, padding key | backward |
|---|---|---|---|
| rows | CPU: long segments | looked up; a padding key leads to "mask" | its own |
| sdpa | everywhere: segments of about the same length as a batch | further channels of q and k | fused |
| varlen | CUDA, 16 bits: torch.nn.attention.varlen or flash-attn | further channels of q and k | fused |
| mask | everywhere | a mask, part by part | keeps the mask |
| flex | CUDA: FlexAttention | looked up in the kernel | fused |

A new kernel is a file with a ``Kernel`` and a line in ``KERNELS``.
"""

from torch import Tensor

from apt_dense.ops.kernels import cpu_sliced, flex, sdpa_bias_as_channels, sdpa_bias_as_mask, varlen
from apt_dense.ops.kernels.interface import Inputs, Kernel

#: In the order in which "auto" asks them.
KERNELS: dict[str, Kernel] = {
    "rows": cpu_sliced.KERNEL,
    "sdpa": sdpa_bias_as_channels.KERNEL,
    "varlen": varlen.KERNEL,
    "mask": sdpa_bias_as_mask.KERNEL,
    "flex": flex.KERNEL,
}
BACKENDS = ("auto", *KERNELS)
_LAST_RESORT = "sdpa"  # runs everywhere, with any terms, and trains in little memory


def packed_attention(inputs: Inputs, backend: str = "auto") -> Tensor:
    """Softmax attention inside each segment.

    Args:
        backend: one of ``BACKENDS``; "auto" chooses by device, type, length and whether gradients are wanted.

    Returns:
        (R, H, D).

    Raises:
        ValueError: for segments of another number of rows, and for a backend that does not exist or cannot run here.
    """
    if len(inputs.q) != inputs.segments.total:
        raise ValueError(
            f"{len(inputs.q)} rows, but the segments hold {inputs.segments.total}: the layout is of another batch"
        )
    if len(inputs.q) == 0:
        return inputs.v
    kernel = KERNELS[choose(inputs) if check_backend(backend) == "auto" else backend]
    obstacle = kernel.obstacle(inputs)
    if obstacle:
        raise ValueError(f"attention backend {backend!r} cannot run: {obstacle}. 'auto' chooses one that can")
    return kernel.run(inputs)


def choose(inputs: Inputs) -> str:
    """The backend that "auto" stands for."""
    fitting = (name for name, kernel in KERNELS.items() if kernel.suits(inputs) and kernel.obstacle(inputs) is None)
    return next(fitting, _LAST_RESORT)


def check_backend(backend: str) -> str:
    """The name itself.

    Raises:
        ValueError: if it is not one of ``BACKENDS``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; expected one of {BACKENDS}")
    return backend
