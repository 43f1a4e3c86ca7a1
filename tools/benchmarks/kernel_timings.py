"""Measure each kernel in each case that "auto" distinguishes on CPUs: linear layers, and attention by type, length,
relative positions and training."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.packed import build_layout
from apt_dense.ops.attention import KERNELS, ON_CPUS, case_of
from apt_dense.ops.bias import RelativeBias
from apt_dense.ops.kernels.interface import Inputs
from apt_dense.ops.measured_kernel_choice import LENGTHS, Case, Seconds
from apt_dense.ops.onednn_matmul import onednn_linear

from benchmarks.meters import seconds_of

DTYPES = "float32", "bfloat16"
HEADS, CHANNELS = 6, 64  # half of ViT-B's heads: their number changes little, their width does
FEWEST_HEADS = 2  # of segments so long that more would take minutes
FEWEST_ROWS = 2048  # of a measured batch, in segments of the case's length
FEWEST_ROUNDS, MOST_SECONDS = 3, 8.0  # of a case: less time if that many rounds are possible in it
LINEAR_ROWS, LINEAR_DIM = 2464, 768  # a ViT-B's MLP at 60 % of 1024 x 1024 pixels
CPU = torch.device("cpu")

Step = Callable[[], object]


def all_cases(lengths: Sequence[int] = LENGTHS) -> list[Case]:
    """List the cases; float16 and padding keys are left to facts."""
    linear = [Case("linear", "float32", 0, "", trains) for trains in (False, True)]
    return linear + [Case("attention", *rest) for rest in product(DTYPES, lengths, ("", "relative"), (False, True))]


def steps_of(case: Case) -> dict[str, Step]:
    """Build one step of the case for each kernel that can run it."""
    return _linear_steps(case) if case.work == "linear" else _attention_steps(case)


def _linear_steps(case: Case) -> dict[str, Step]:
    shapes = (LINEAR_ROWS, LINEAR_DIM), (4 * LINEAR_DIM, LINEAR_DIM), (4 * LINEAR_DIM,)
    operands = [_leaf(case, *shape) for shape in shapes]
    ways = {"pytorch": F.linear, "onednn": onednn_linear}
    return {name: step_of(partial(way, *operands), operands) for name, way in ways.items()}


def _attention_steps(case: Case) -> dict[str, Step]:
    inputs, operands = attention_inputs(case)
    able = [name for name in ON_CPUS if KERNELS[name].obstacle(inputs) is None]
    return {name: step_of(partial(KERNELS[name].run, inputs), operands) for name in able}


def attention_inputs(case: Case) -> tuple[Inputs, list[Tensor]]:
    """Return operands of which ``case_of`` says that case, and the leaves among them."""
    side = math.isqrt(case.length - 1) + 1
    scale_map = torch.full((-(-FEWEST_ROWS // case.length), side * side), -1, dtype=torch.int8)
    scale_map[:, : case.length] = 0
    layout = build_layout(scale_map.unflatten(1, (side, side)), 1)
    shape = layout.images.total, max(FEWEST_HEADS, HEADS * FEWEST_ROWS // max(case.length, FEWEST_ROWS)), CHANNELS
    operands = [_leaf(case, *shape) for _ in range(3)]
    bias = None
    if case.terms == "relative":
        operands.append(_leaf(case, *shape[:2], 2 * side))
        bias = RelativeBias(operands[-1], layout.image_cells)
    inputs = Inputs(*operands[:3], layout.images, bias)
    if case_of(inputs) != case:
        raise ValueError(f"operands of {case_of(inputs)} for {case}: expected one of all_cases()")
    return inputs, operands


def _leaf(case: Case, *shape: int) -> Tensor:
    return torch.randn(shape).mul_(0.1).to(getattr(torch, case.dtype)).requires_grad_(case.trains)


def step_of(forward: Callable[[], Tensor], operands: Sequence[Tensor]) -> Step:
    """Return a forward pass, with the gradients of all operands if these want any."""
    if not operands[0].requires_grad:
        return torch.inference_mode()(forward)

    def run() -> None:
        out = forward()
        torch.autograd.grad(out, operands, torch.ones_like(out))

    return run


def time_case(case: Case, rounds: int, clock: Callable[[Step], float] | None = None) -> dict[str, Seconds]:
    """Time all kernels of a case, which take turns in every round; the first round does not count.

    Args:
        rounds: at most; fewer where they would take longer than ``MOST_SECONDS``, but ``FEWEST_ROUNDS``.
    """
    clock = clock or partial(seconds_of, device=CPU)
    steps = steps_of(case)
    first = sum([clock(step) for step in steps.values()])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(min(rounds, max(FEWEST_ROUNDS, int(MOST_SECONDS / first)))):
        for name, step in steps.items():
            seconds[name].append(clock(step))
    return {name: quartiles(found) for name, found in seconds.items()}


def quartiles(seconds: Sequence[float]) -> Seconds:
    """Return the lower quartile, the median and the upper quartile."""
    if len(seconds) == 1:
        return Seconds(*seconds * 3)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Seconds(low, statistics.median(seconds), high)


def table(times: Mapping[str, Mapping[str, Seconds]], chosen: Callable[[Case], tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a case a line, each kernel's median ms, what is taken and why.

    Args:
        chosen: case -> the kernel that "auto" takes, and the reason.
    """
    yield "| case | ms (quartiles) | taken | because |"
    yield "|---|---|---|---|"
    for case in all_cases():
        found = times.get(case.key, {})
        cells = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in found.items())
        yield f"| {case.key.replace('[]', '')} | {cells or 'not measured'} | {' | '.join(chosen(case))} |"


def _ms(seconds: Seconds) -> str:
    low, median, high = (1e3 * second for second in seconds)
    return f"{median:.3g} ({low:.3g}-{high:.3g})"
