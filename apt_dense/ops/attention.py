"""Attention over packed segments: the registry of kernels, and the choice among them.

| backend | where | relative positions, padding key | backward |
|---|---|---|---|
| rows | CPU: long segments | looked up, in bfloat16 further channels; a padding key leads to "mask" | its own |
| sdpa | everywhere: segments of about the same length as a batch | further channels of q and k | fused |
| varlen | CUDA, 16 bits: torch.nn.attention.varlen or flash-attn | further channels of q and k | fused |
| mask | everywhere | a mask, part by part | keeps the mask |
| flex | CUDA: FlexAttention | looked up in the kernel | fused |

A new kernel is a file with a ``Kernel`` and a line in ``KERNELS``.
"""

from torch import Tensor

from apt_dense.ops.kernels import cpu_sliced, flex, sdpa_bias_as_channels, sdpa_bias_as_mask, varlen
from apt_dense.ops.kernels.interface import Inputs, Kernel
from apt_dense.ops.measured_kernel_choice import Case, fastest, nearest_length
from apt_dense.runtime import runs_on_host

#: In the order in which "auto" asks them.
KERNELS: dict[str, Kernel] = {
    "rows": cpu_sliced.KERNEL,
    "sdpa": sdpa_bias_as_channels.KERNEL,
    "varlen": varlen.KERNEL,
    "mask": sdpa_bias_as_mask.KERNEL,
    "flex": flex.KERNEL,
}
BACKENDS = ("auto", *KERNELS)
#: Those that are measured on CPUs. "flex" would run there without being compiled.
ON_CPUS = "rows", "sdpa", "mask"
_LAST_RESORT = "sdpa"  # runs everywhere, with any terms, and trains in little memory


def packed_attention(inputs: Inputs, backend: str = "auto") -> Tensor:
    """Softmax attention inside each segment.

    Args:
        backend: one of ``BACKENDS``; "auto" chooses by device, type, length and whether gradients are wanted, from what
            ``tools/tune_kernels.py`` measured on this machine, if it did.

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
    """The backend that "auto" stands for: the fastest measured on this machine, else the first that suits."""
    return measured(inputs) or next(
        (name for name, kernel in KERNELS.items() if kernel.suits(inputs) and kernel.obstacle(inputs) is None),
        _LAST_RESORT,
    )


def measured(inputs: Inputs) -> str | None:
    """The fastest backend by what was measured on this machine; None on GPUs, compiled, and where nothing was."""
    if not runs_on_host(inputs.q):
        return None
    able = [name for name in ON_CPUS if KERNELS[name].obstacle(inputs) is None]
    return fastest(case_of(inputs), _LAST_RESORT, able)


def case_of(inputs: Inputs) -> Case:
    """The case under which such operands are measured."""
    terms = [("relative", inputs.bias), ("padding", inputs.padding), ("weights", inputs.logit_R)]
    return Case(
        "attention",
        str(inputs.q.dtype).removeprefix("torch."),
        nearest_length(inputs.segments.mean_length),
        ", ".join(name for name, term in terms if term is not None),
        inputs.trains,
    )


def check_backend(backend: str) -> str:
    """The name itself.

    Raises:
        ValueError: if it is not one of ``BACKENDS``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; expected one of {BACKENDS}")
    return backend
