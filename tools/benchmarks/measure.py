"""Time, memory and FLOPs of one model, and of several that take turns.

A model that cannot be built, or fails while it is measured, keeps the reason; the others go on.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm


class Variant(NamedTuple):
    """A built model together with its input.

    Args:
        module: holds the weights, already in training or evaluation mode.
        infer: one forward pass.
        loss: one forward pass to a scalar that can be differentiated.
        tokens: the share of all patches of 16 pixels that the blocks see.
        blocks: the transformer blocks, where the time outside them is wanted.
        is_compiled: whether ``infer`` runs compiled code.
    """

    module: nn.Module
    infer: Callable[[], object]
    loss: Callable[[], Tensor]
    tokens: float = 1.0
    blocks: Sequence[nn.Module] = ()
    is_compiled: bool = False


class Candidate(NamedTuple):
    """A variant that is not built yet.

    Args:
        role: "twin" (uniform, what ratios refer to), "ours", or the package of a baseline.
    """

    name: str
    role: str
    build: Callable[[], Variant]


class Way(NamedTuple):
    """How a variant is run: "inference" or "training", where, and under autocast to a type other than float32."""

    step: str
    device: torch.device
    dtype: torch.dtype


@dataclass
class Result:
    """What was measured of one candidate; None where it was not."""

    name: str
    role: str
    seconds: list[float] = field(default_factory=list)  # of every round
    tokens: float | None = None
    gflops: float | None = None
    memory_mib: float | None = None
    outside_blocks: float | None = None  # share of the time
    failure: str = ""


def measure(candidates: Sequence[Candidate], way: Way, rounds: int, label: str) -> list[Result]:
    """Build and measure all candidates; in every round each takes its turn, after a round that does not count."""
    entries = [(Result(c.name, c.role), _Slot()) for c in candidates]
    for candidate, (result, slot) in zip(candidates, entries, strict=True):
        _attempt(result, slot, lambda: slot.fill(candidate.build()))
    for number in tqdm(range(rounds + 1), label, leave=False):
        for result, slot in entries:
            _attempt(result, slot, lambda: _time_round(result, slot, way, counts=number > 0))
    for result, slot in tqdm(entries, f"{label}: FLOPs, memory", leave=False):
        _attempt(result, slot, lambda: _count(result, slot, way, rounds))
    return [result for result, _ in entries]


class _Slot:
    """Where a built variant lives, so that a failed one can be let go."""

    variant: Variant | None = None

    def fill(self, variant: Variant) -> None:
        self.variant = variant


def _attempt(result: Result, slot: _Slot, action: Callable[[], None]) -> None:
    """Run a part of the measurement unless an earlier part failed."""
    if result.failure:
        return
    torch.manual_seed(0)  # detectors draw the boxes that they train on
    try:
        action()
    except Exception as error:  # of any kind: what one host raises must not end a run of hours
        first_line = (str(error).strip().splitlines() or [""])[0]
        result.failure = f"{type(error).__name__}: {first_line}"[:160]
        result.seconds, slot.variant = [], None
    if result.failure and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _time_round(result: Result, slot: _Slot, way: Way, counts: bool) -> None:
    seconds = seconds_of(lambda: run(slot.variant, way), way.device)
    if counts:
        result.seconds.append(seconds)


def _count(result: Result, slot: _Slot, way: Way, rounds: int) -> None:
    variant = slot.variant
    result.tokens = variant.tokens
    # A compiled graph shows the counter nothing; its operations are those of the eager model.
    with torch.compiler.set_stance("force_eager") if variant.is_compiled else nullcontext():
        # In float32, as many: under autocast the counter takes some products apart outside of its reach.
        result.gflops = gflops_of(lambda: run(variant, way._replace(dtype=torch.float32)))
    result.memory_mib = memory_of(lambda: run(variant, way), way.device)
    if variant.blocks and way.step == "inference":
        shares = sorted(share_outside(variant, way) for _ in range(rounds))
        result.outside_blocks = shares[len(shares) // 2]


def run(variant: Variant, way: Way) -> None:
    """One inference, or one forward and backward pass whose gradients are then dropped."""
    with torch.autocast(way.device.type, way.dtype, enabled=way.dtype != torch.float32):
        if way.step == "inference":
            with torch.inference_mode():
                variant.infer()
            return
        loss = variant.loss()
    loss.backward()
    variant.module.zero_grad(set_to_none=True)


def seconds_of(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, all work on the device included."""
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(action: Callable[[], None], device: torch.device) -> float:
    """MiB by which one call raises the peak of the memory that tensors take, over what they took before.

    On a CPU the same in every run, unlike the resident set of the process; scratch memory inside of kernels that is
    not a tensor does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    # Allocations are events of their own; sums per operator would not show which of them live at the same time.
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
    """Floating point operations of matrix products, convolutions and attention, in 1e9 (a multiply-add is two)."""
    # Of fused attention PyTorch's counter knew the kernels of GPUs alone before 2.15.
    aten = torch.ops.aten
    on_cpus = {
        aten._scaled_dot_product_flash_attention_for_cpu: _flops_of_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _flops_of_its_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpus) as counter:
        action()
    return counter.get_total_flops() / 1e9


def share_outside(variant: Variant, way: Way) -> float:
    """The share of a run's time that is spent outside of the blocks: on choosing and embedding patches, scattering."""
    inside, entered = 0.0, 0.0

    def enter(*_: object) -> None:
        nonlocal entered
        _wait(way.device)
        entered = time.perf_counter()

    def leave(*_: object) -> None:
        nonlocal inside
        _wait(way.device)
        inside += time.perf_counter() - entered

    hooks = [block.register_forward_pre_hook(enter) for block in variant.blocks]
    hooks += [block.register_forward_hook(leave) for block in variant.blocks]
    try:
        total = seconds_of(lambda: run(variant, way), way.device)
    finally:
        for hook in hooks:
            hook.remove()
    return 1 - inside / total
