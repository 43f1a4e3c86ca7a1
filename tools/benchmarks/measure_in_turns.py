"""Several models that take turns, so that a busy machine slows all of them.

A model that cannot be built, or fails while it is measured, keeps the reason; the others continue.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.meters import gflops_of, memory_of, seconds_of, share_outside


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
    """Figures of one candidate; None where it was not measured."""

    name: str
    role: str
    seconds: list[float] = field(default_factory=list)  # of every round
    tokens: float | None = None
    gflops: float | None = None
    memory_mib: float | None = None
    outside_blocks: float | None = None  # share of the time
    failure: str = ""


def measure(candidates: Sequence[Candidate], way: Way, rounds: int, label: str) -> list[Result]:
    """Build and measure all candidates; each takes its turn in every round, after a round that does not count."""
    entrants = [_Entrant(candidate) for candidate in candidates]
    for entrant in entrants:
        entrant.attempt(entrant.build)
    for number in tqdm(range(rounds + 1), label, leave=False):
        for entrant in entrants:
            entrant.attempt(entrant.time, way, number > 0)
    for entrant in tqdm(entrants, f"{label}: FLOPs, memory", leave=False):
        entrant.attempt(entrant.count, way, rounds)
    return [entrant.result for entrant in entrants]


class _Entrant:
    """A candidate, its variant once it is built, and what was measured of it."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.result = Result(candidate.name, candidate.role)
        self.variant: Variant | None = None

    def attempt(self, part: Callable[..., None], *arguments: object) -> None:
        """Run a part of the measurement unless an earlier part failed; a failed variant is freed."""
        if self.result.failure:
            return
        torch.manual_seed(0)  # detectors draw the boxes that they train on
        try:
            part(*arguments)
        except Exception as error:  # of any kind: what one host raises must not end a run of hours
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.result.failure = f"{type(error).__name__}: {first_line}"[:160]
            self.result.seconds = []
            self.variant = None
        if self.result.failure and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def build(self) -> None:
        self.variant = self.candidate.build()

    def time(self, way: Way, counts: bool) -> None:
        seconds = seconds_of(lambda: run(self.variant, way), way.device)
        if counts:
            self.result.seconds.append(seconds)

    def count(self, way: Way, rounds: int) -> None:
        """Measure tokens, FLOPs, memory, and the share of the time outside of the blocks."""
        variant, result = self.variant, self.result
        result.tokens = variant.tokens
        # The counter sees nothing of a compiled graph, whose operations are those of the eager model.
        with torch.compiler.set_stance("force_eager") if variant.is_compiled else nullcontext():
            # In float32: the count is the same, and under autocast the counter misses some products.
            result.gflops = gflops_of(lambda: run(variant, way._replace(dtype=torch.float32)))
        result.memory_mib = memory_of(lambda: run(variant, way), way.device)
        if variant.blocks and way.step == "inference":
            shares = [share_outside(variant.blocks, lambda: run(variant, way), way.device) for _ in range(rounds)]
            result.outside_blocks = sorted(shares)[len(shares) // 2]


def run(variant: Variant, way: Way) -> None:
    """Run one inference, or one forward and backward pass whose gradients are then dropped."""
    with torch.autocast(way.device.type, way.dtype, enabled=way.dtype != torch.float32):
        if way.step == "inference":
            with torch.inference_mode():
                variant.infer()
            return
        loss = variant.loss()
    loss.backward()
    variant.module.zero_grad(set_to_none=True)
