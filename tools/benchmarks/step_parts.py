"""The time of a training step by the modules that spend it, forward and backward."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

_PART, _BACKWARD = "part: ", "autograd::engine::evaluate_function: "
# What hosts call: MMSegmentation asks heads for their loss, and heads on tokens ask the backbone for tokens.
_METHODS = "forward", "loss", "forward_tokens", "from_tokens"
OPTIMIZER, REST = "optimizer", "the model itself"


class Step(NamedTuple):
    """A model in training mode, and one forward pass of it to its loss."""

    model: nn.Module
    loss: Callable[[], Tensor]


class Part(NamedTuple):
    """Milliseconds of a module, without those of the parts inside of it.

    Args:
        name: path of the module, of numbered ones "#": "backbone.blocks.#.attn".
        package: that defines its type.
    """

    name: str
    package: str
    forward: float
    backward: float


def parts_of_step(step: Step, optimizer: torch.optim.Optimizer, depth: int) -> list[Part]:
    """Profile one training step on the CPU, or as the host sees it.

    The backward pass of an operation is counted for the module that ran it forward, by the sequence numbers that
    autograd gives both.

    Args:
        depth: of the paths of modules, numbers not counted.
    """
    packages = {REST: "", OPTIMIZER: "torch"}
    with _named_ranges(step.model, depth, packages), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step.loss().backward()
        with record_function(_PART + OPTIMIZER):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    forward, backward = times_by_part(profiler.events())
    names = sorted({*forward, *backward}, key=list(packages).index)
    return [Part(name, packages[name], forward[name] / 1e3, backward[name] / 1e3) for name in names]


@contextmanager
def _named_ranges(model: nn.Module, depth: int, packages: dict[str, str]) -> Iterator[None]:
    """Name the time inside each module for the profiler, and note the packages of their types."""
    with ExitStack() as undo:
        for path, module in model.named_modules():
            name = _name(path)
            if name and name.replace(".#", "").count(".") < depth:
                packages.setdefault(name, type(module).__module__.partition(".")[0])
                for method in set(_METHODS) & set(dir(module)):
                    _name_calls(module, method, name)
                    undo.callback(delattr, module, method)  # the class has it still
        yield


def _name_calls(module: nn.Module, method: str, name: str) -> None:
    call = getattr(module, method)

    def named(*arguments: object, **options: object) -> object:
        with record_function(_PART + name):
            return call(*arguments, **options)

    setattr(module, method, named)


def _name(path: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def times_by_part(events: Any) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Microseconds of the forward and of the backward pass by part, of the profiler's events."""
    forward, backward = defaultdict(float), defaultdict(float)
    part_of_sequence: dict[int, str] = {}
    events = sorted(events, key=lambda event: event.time_range.start)
    for event in events:
        if not event.name.startswith(_PART) and event.sequence_nr >= 0 and not _is_backward(event):
            part_of_sequence[event.sequence_nr] = _part_of(event)  # the last: of the operation that made the node
    for event in events:
        if event.name.startswith(_BACKWARD) and not _is_backward(event.cpu_parent):
            backward[part_of_sequence.get(event.sequence_nr, REST)] += event.cpu_time_total
        elif not _is_backward(event):
            forward[_part_of(event)] += event.self_cpu_time_total
    return forward, backward


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_backward(event: Any) -> bool:
    return any(other.name.startswith(_BACKWARD) for other in _ancestors(event))


def _part_of(event: Any) -> str:
    """The innermost part that an event of the forward pass is in."""
    names = (other.name for other in _ancestors(event))
    return next((name.removeprefix(_PART) for name in names if name.startswith(_PART)), REST)
