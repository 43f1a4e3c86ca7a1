"""Questions about the machine: the device of a tensor, the compiler, the processor.

Only this file and the kernels in ``ops`` ask them, so that the rest reads the same wherever it runs.
"""

import platform
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_VENDORS = "AuthenticAMD", "GenuineIntel"


def runs_on_host(tensor: Tensor) -> bool:
    """Check whether operations on a tensor run on the CPU, not compiled, so that looking at values costs nothing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_traced() -> bool:
    """Check whether a compiler or an exporter follows the operations, instead of their running one after the other."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def outside_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, which ``torch.compile`` then calls as it is, with all that it calls.

    For loops whose length comes from the images: compiled, they would make graphs for each image.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def is_exporting() -> bool:
    """Check whether ``torch.export`` makes a graph of what is called, which can have no part outside it."""
    return torch.compiler.is_exporting()


def is_compiling() -> bool:
    """Check whether ``torch.compile`` or ``torch.export`` makes a graph of what is called."""
    return torch.compiler.is_compiling()


def is_compiled(model: torch.nn.Module) -> bool:
    """Check whether ``torch.compile`` or ``Module.compile`` was called on a model, a wrapper around it or a part."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def graph_limit() -> int:
    """The number of graphs that ``torch.compile`` makes of one function before it stops."""
    config = torch._dynamo.config
    return getattr(config, "recompile_limit", None) or config.cache_size_limit


def is_tracing() -> bool:
    """Check whether ``torch.jit.trace`` records what is done with an example, as if it held for all images."""
    return torch.jit.is_tracing()


def is_vmapped(tensor: Tensor) -> bool:
    """Check whether a tensor stands for several that ``torch.vmap`` goes through, also inside of ``torch.func.grad``
    and its like."""
    wrappers = torch._C._functorch
    while not torch.compiler.is_compiling() and wrappers.is_functorch_wrapped_tensor(tensor):
        if wrappers.is_batchedtensor(tensor):
            return True
        tensor = wrappers.get_unwrapped(tensor)
    return False


def refuse_scripting(module: torch.nn.Module) -> NoReturn:
    """Raise a TypeError; ``torch.jit.script`` calls it as a module's ``__prepare_scriptable__``."""
    raise TypeError(
        f"torch.jit.script cannot compile {type(module).__name__}: TorchScript lacks types that it uses; use "
        f"torch.export, with thresholds=() or a token_budget, or torch.compile"
    )


def as_constants(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as constants of a compiled graph: other sizes then get a graph of their own, where the compiler would make
    one with unknown sizes, over which no loop can be unrolled."""
    return tuple(len(range(size)) for size in sizes) if torch.compiler.is_compiling() else tuple(sizes)


def require(condition: Tensor, error: str) -> None:
    """Raise if a boolean scalar is False: a ValueError on a CPU; compiled or on another device an assertion of the
    device, for which nothing waits."""
    if not runs_on_host(condition):
        torch._assert_async(condition, error)
    elif not condition:
        raise ValueError(error)


def bin_counts(slots: Tensor, length: int) -> Tensor:
    """Count how often each number from 0 to ``length`` - 1 occurs in ``slots`` (int64): (length,) whole numbers."""
    if runs_on_host(slots):
        return torch.bincount(slots, minlength=length)
    # bincount would wait for the device to learn the largest slot.
    counts = torch.zeros(length, dtype=torch.int32, device=slots.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))


def to_device(tensors: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Host tensors of whole numbers and truth values on the device, by a single copy that nothing waits for."""
    if device.type == "cpu":
        return list(tensors)
    flat = torch.cat([t.flatten().long() for t in tensors if t is not None])
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = iter(flat.split([t.numel() for t in tensors if t is not None]))
    return [None if t is None else next(parts).view(t.shape).to(t.dtype) for t in tensors]


def has_16_bits(dtype: torch.dtype) -> bool:
    """Check for the floating-point types of half the width."""
    return dtype in (torch.bfloat16, torch.float16)


def computes_in_16_bits(x: Tensor) -> bool:
    """Check whether layers on the CPU compute in such a type, the operand's own or autocast's."""
    return has_16_bits(x.dtype) or torch.is_autocast_enabled("cpu")


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which operations on the tensor's device keep the types of their operands."""
    return torch.autocast(tensor.device.type, enabled=False)


def is_transformed() -> bool:
    """Check whether torch.func or forward-mode derivatives are at work, of which our operators know nothing."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _cpuinfo(field: str) -> str | None:
    """Read a field of Linux's /proc/cpuinfo, of the first core; None where there is none."""
    info = Path("/proc/cpuinfo")
    found = re.search(rf"{field}\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else None


@cache
def processor_vendor() -> str:
    """The maker of the CPU as it calls itself: "AuthenticAMD", "GenuineIntel", ...; "" where that cannot be read."""
    return _cpuinfo("vendor_id") or next((word for word in _VENDORS if word in platform.processor()), "")


@cache
def describe_machine() -> str:
    """Name the processor and its instruction sets as PyTorch uses them: "AMD EPYC, AVX512, bfloat16 by AMX, ..."."""
    units = [f"{str(t).removeprefix('torch.')} by AMX" for t in (torch.bfloat16, torch.float16) if has_matrix_unit(t)]
    if multiplies_bfloat16() and not has_matrix_unit(torch.bfloat16):
        units.append("bfloat16 by AVX512_BF16")
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return ", ".join([name, torch.backends.cpu.get_cpu_capability(), *units])


@cache
def processor_family() -> int:
    """The family number of an x86 processor, 26 for AMD's Zen 5; 0 where it cannot be read."""
    return int(_cpuinfo("cpu family") or 0)


def is_amd() -> bool:
    """Check whether the processor is AMD's. A fact about the processor, so that every run on a machine chooses the same
    way; so are the following."""
    return processor_vendor() == "AuthenticAMD"


def has_slow_mkl() -> bool:
    """Check whether MKL, which PyTorch takes for float32 products and whose code for AMD's processors is AVX2, leaves
    half of the CPU unused: from Zen 5 on, whose vector units are 512 bits wide."""
    return is_amd() and processor_family() >= 26


def has_avx512() -> bool:
    """Check whether PyTorch uses AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiplies_bfloat16() -> bool:
    """Check whether the CPU has instructions that multiply bfloat16: AVX512_BF16 or AMX."""
    return has_matrix_unit(torch.bfloat16) or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def has_matrix_unit(dtype: torch.dtype) -> bool:
    """Check whether PyTorch multiplies in a type on a matrix unit of the CPU (Intel's AMX)."""
    names = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}
    return dtype in names and getattr(torch.cpu, names[dtype], lambda: False)()
