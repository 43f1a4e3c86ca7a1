"""Meters of one call: seconds, peak memory, floating point operations, and the time outside of the blocks."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def seconds_of(action: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one call, including all work on the device."""
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(action: Callable[[], None], device: torch.device) -> float:
    """Return the MiB by which one call raises the peak of the memory that tensors take.

    On a CPU the figure is the same in every run, unlike the resident set of the process. Scratch memory inside of
    kernels that is not a tensor does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    # Single allocations, since sums per operator would not show which of them live at the same time.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def _flops_of_attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def _flops_of_its_backward(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def gflops_of(action: Callable[[], None]) -> float:
    """Count operations of matrix products, convolutions and attention, in 1e9 (a multiply-add is two)."""
    # Before 2.15, PyTorch's counter knew fused attention on GPUs only.
    aten = torch.ops.aten
    on_cpus = {
        aten._scaled_dot_product_flash_attention_for_cpu: _flops_of_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _flops_of_its_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpus) as counter:
        action()
    return counter.get_total_flops() / 1e9


def share_outside(blocks: Sequence[nn.Module], action: Callable[[], None], device: torch.device) -> float:
    """Return the share of a call's time spent outside of the blocks: on choosing, embedding and scattering patches."""
    inside = entered = 0.0

    def enter(*_: object) -> None:
        nonlocal entered
        _wait(device)
        entered = time.perf_counter()

    def leave(*_: object) -> None:
        nonlocal inside
        _wait(device)
        inside += time.perf_counter() - entered

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        total = seconds_of(action, device)
    finally:
        for hook in hooks:
            hook.remove()
    return 1 - inside / total
