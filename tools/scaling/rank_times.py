"""What each process of a training computes, and how long it waits for the others, step by step.

A process waits from the moment when its last gradient is ready until all others are as far. There, one more barrier is
put into the exchange of gradients of DistributedDataParallel, and the clock is read before and after it. CPUs only: on
a GPU the clock would have to wait for the device.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from apt_dense import APTViT

FIELDS = "tokens", "own", "waited"

_POLL = 0.02  # seconds between looks at the processes


class RankTimes(NamedTuple):
    """Steps of all processes, each (steps, ranks).

    Args:
        tokens: in the batch.
        own: seconds from the end of the last exchange to the last gradient: optimizer, data, forward, backward.
        waited: seconds for the others.
    """

    tokens: np.ndarray
    own: np.ndarray
    waited: np.ndarray

    @property
    def seconds(self) -> float:
        """Mean time of a step."""
        return float((self.own + self.waited).mean())

    @property
    def waste(self) -> float:
        """Share of the time of all processes that is waiting."""
        return float(self.waited.sum() / (self.own + self.waited).sum())


def record_process(main: Callable[[], None], path: Path) -> None:
    """Run a training of this process, and write its steps to a file, a JSON object each."""
    original = DistributedDataParallel.__init__

    def observed(model: DistributedDataParallel, *args: Any, **options: Any) -> None:
        original(model, *args, **options)
        _Observer(model, path)

    DistributedDataParallel.__init__ = observed
    try:
        main()
    finally:
        DistributedDataParallel.__init__ = original


class _Observer:
    """Counts the tokens of a model's training, and times the exchange of its gradients."""

    def __init__(self, model: DistributedDataParallel, path: Path) -> None:
        self.path, self.group, self.tokens, self.since = path, dist.new_group(), 0, None
        path.write_text("", encoding="utf-8")
        for module in model.modules():
            if isinstance(module, APTViT):
                module.blocks[0].register_forward_hook(self.count)
        model.register_comm_hook(None, self.exchange)

    def count(self, block: nn.Module, arguments: tuple, output: Any) -> None:
        """Count the tokens of the layout, which is the first block's argument."""
        if block.training:
            self.tokens += len(arguments[1].image_N)

    def exchange(self, state: None, bucket: dist.GradBucket) -> Future[Tensor]:
        """Start to exchange gradients; if they are the last of a step, first wait for the others."""
        if bucket.is_last():
            ready = time.perf_counter()
            dist.barrier(self.group)
            now = time.perf_counter()
            if self.since is not None:
                step = dict(zip(FIELDS, (self.tokens, ready - self.since, now - ready), strict=True))
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(step) + "\n")
            self.tokens, self.since = 0, now
        return allreduce_hook(dist.group.WORLD, bucket)


def read_times(paths: list[Path], warm_up: int) -> RankTimes:
    """Read what processes wrote, without the first steps.

    Raises:
        ValueError: if there are no more steps than these, or processes took different numbers of steps.
    """
    ranks = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][warm_up:] for path in paths]
    lengths = {len(rank) for rank in ranks}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"processes recorded {sorted(lengths)} steps after {warm_up}; expected equally many, and some")
    return RankTimes(*(np.array([[step[name] for step in rank] for rank in ranks]).T for name in FIELDS))


def run_processes(main: Callable[[int], None], ranks: int) -> list[int]:
    """Run a function in forked processes, one per rank, and return their exit statuses. If one fails, the others, which
    would wait for it, are ended."""
    children, statuses = [], {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _run_forked(main, rank)
        children.append(child)
    while len(statuses) < ranks:
        time.sleep(_POLL)
        for child in [child for child in children if child not in statuses]:  # others may be somebody else's
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()):
            for other in {*children} - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]


def free_port() -> int:
    """Find a port by which processes can meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run_forked(main: Callable[[int], None], rank: int) -> None:
    status = 1
    try:
        main(rank)
        status = 0
    except SystemExit as ended:
        with suppress(BaseException):
            print(ended.code, flush=True)
    except BaseException as error:
        with suppress(BaseException):
            print(f"process {rank}: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)
