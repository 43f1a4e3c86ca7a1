"""What a training would do, by a few of its steps, of which nothing is kept: parameter groups, tokens, memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from apt_dense import APTViT

from benchmarks.meters import memory_of
from shared.token_counts import TokenCounter

BATCHES = 4  # of which tokens are counted
MIB = 2**20


class Trial(NamedTuple):
    """A training that is ready to start, in one process.

    Args:
        loss: trains on the next batch of a process up to the loss.
        images: per process and batch.
        processes: that the training will have.
        accumulate: batches per step of the optimizer.
        tokens: of each image of the data set, if they have been counted.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    images: int
    processes: int = 1
    accumulate: int = 1
    tokens: Sequence[float] | None = None


def describe_trial(trial: Trial) -> str:
    """Run a few steps and describe them in Markdown. The model and the optimizer are changed by these."""
    tokens, memory = _tokens_and_memory(trial)
    return "\n\n".join([describe_groups(trial.model, trial.optimizer), tokens, memory])


def describe_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """List the groups of an optimizer, and what it does not train."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lines = ["| group | learning rate | weight decay | parameters | tensors |", "| ---: | ---: | ---: | ---: | --- |"]
    trained = 0
    for group, shown in _merged(optimizer.param_groups):
        own = [parameter for parameter in group if parameter.requires_grad]
        trained += _elements(own)
        rate, decay = shown
        lines.append(f"| {len(lines) - 2} | {rate:.4g} | {decay:.4g} | {_elements(own):,} | {_named(own, names)} |")
    frozen = _elements(p for p in model.parameters() if not p.requires_grad)
    lines += ["", f"{trained:,} parameters are trained, {frozen:,} are frozen."]
    return "\n".join(lines)


def _merged(groups: Sequence[dict]) -> list[tuple[list[Tensor], tuple[float, float]]]:
    """The parameters of each learning rate and weight decay: some hosts make a group of each parameter."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for group in groups:
        rate = group.get("initial_lr", group["lr"])  # schedulers start with a lower one
        found.setdefault((rate, group.get("weight_decay", 0.0)), []).extend(group["params"])
    return [(found[key], key) for key in sorted(found)]


def _named(parameters: Sequence[Tensor], names: dict[int, str]) -> str:
    """How many there are, the first and the last."""
    found = [names.get(id(parameter), "?") for parameter in parameters]
    return f"{len(found)}: {', '.join(dict.fromkeys([found[0], found[-1]]))}" if found else "0"


def _elements(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _tokens_and_memory(trial: Trial) -> tuple[str, str]:
    device = next(trial.model.parameters()).device
    backbones = [module for module in trial.model.modules() if isinstance(module, APTViT)]
    counters, counts, peak = [TokenCounter(one) for one in backbones], [], 0.0
    for number in range(BATCHES):
        trial.optimizer.zero_grad(set_to_none=True)
        if number == 0:
            peak = memory_of(lambda: trial.loss().backward(), device)
            gradients = sum(_bytes(p.grad) for p in trial.model.parameters() if p.grad is not None)
            trial.optimizer.step()
        else:
            try:
                with torch.no_grad():
                    trial.loss()
            except StopIteration:  # the training is shorter
                break
        counts.append(sum(counter.take_counts()[0] for counter in counters))
    return _describe_tokens(trial, np.array(counts)), _describe_memory(trial, peak, gradients)


def _describe_tokens(trial: Trial, counts: np.ndarray) -> str:
    if trial.tokens is not None:
        mean, source = float(np.mean(trial.tokens)) * trial.images, f"{len(trial.tokens)} counted images"
    else:
        mean, source = float(counts.mean()), f"{len(counts)} batches, of {counts.min()} to {counts.max()}"
    step = mean * trial.processes * trial.accumulate
    return (
        f"Tokens expected: {mean / trial.images:.0f} per image, {mean:.0f} per batch of {trial.images} of a process, "
        f"{step:.0f} per step of {trial.processes} x {trial.accumulate} such batches (from {source})."
    )


def _describe_memory(trial: Trial, peak: float, gradients: int) -> str:
    weights = sum(map(_bytes, [*trial.model.parameters(), *trial.model.buffers()])) / MIB
    states = sum(
        _bytes(value) for state in trial.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ) / MIB  # fmt: skip
    buckets = gradients / MIB if trial.processes > 1 else 0.0
    total = weights + states + peak + buckets
    return (
        f"Memory expected per process: {total:,.0f} MiB of tensors: weights {weights:,.0f}, optimizer {states:,.0f}, "
        f"a batch's activations and gradients {peak:,.0f} at their peak, DDP's buckets {buckets:,.0f}; the "
        f"framework and the libraries come on top."
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
