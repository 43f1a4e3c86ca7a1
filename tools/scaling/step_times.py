"""Step times of trainings with many processes, by going through the order in which they would read images.

A step takes as long as its slowest process. Time to exchange gradients is not part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from apt_dense.hosts.balanced_order import BalancedOrder


class Setup(NamedTuple):
    """How a training is spread.

    Args:
        ranks: number of processes.
        batch_size: images per process and batch.
        accumulate: batches per step, between which processes do not wait for each other.
    """

    ranks: int
    batch_size: int = 1
    accumulate: int = 1


class StepTimes(NamedTuple):
    """Means over steps.

    Args:
        seconds: of a step, which is its slowest process.
        waste: share of the time of all processes that is waiting.
        standard_error: of ``seconds``, from the number of steps gone through.
    """

    seconds: float
    waste: float
    standard_error: float = 0.0


def step_times(
    costs: Callable[[np.ndarray], np.ndarray],
    tokens: Sequence[float],
    orders: Iterator[np.ndarray],
    setup: Setup,
    steps: int,
) -> StepTimes:
    """Go through steps of an order.

    Args:
        costs: seconds of a batch for its number of tokens.
        tokens: of each image.
        orders: batches (ranks, batch_size) of images, as :meth:`BalancedOrder.steps` and :func:`shuffled_steps` give.
        steps: number of steps to go through.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    batches = np.stack([tokens[images].sum(1) for images in islice(orders, steps * setup.accumulate)])
    return times_of(costs(batches).reshape(steps, setup.accumulate, setup.ranks).sum(1))


def times_of(seconds: np.ndarray) -> StepTimes:
    """Sum up what each process takes for each step, (S, ranks)."""
    longest = seconds.max(1)
    waste = 1 - seconds.mean() / longest.mean()
    return StepTimes(float(longest.mean()), float(waste), float(longest.std() / len(longest) ** 0.5))


def shuffled_steps(images: int, setup: Setup, seed: int) -> Iterator[np.ndarray]:
    """Batches (ranks, batch_size) as MMEngine's InfiniteSampler and Detectron2's TrainingSampler make them: all images
    in a random order, then in another, each process taking every so-manieth."""
    random, size = np.random.default_rng(seed), setup.ranks * setup.batch_size
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, random.permutation(images)])
        whole = len(left) // size * size
        yield from left[:whole].reshape(-1, setup.batch_size, setup.ranks).swapaxes(1, 2)
        left = left[whole:]


def balanced_steps(tokens: Sequence[float], setup: Setup, seed: int) -> Iterator[np.ndarray]:
    """Batches (ranks, batch_size) as the balanced samplers of both hosts make them."""
    return BalancedOrder(tokens, setup.ranks, setup.batch_size, seed).steps()


def budget_times(costs: Callable[[np.ndarray], np.ndarray], tokens: float, setup: Setup) -> StepTimes:
    """Steps in which each image has the same tokens, so that nobody waits."""
    return StepTimes(setup.accumulate * float(costs(np.array(tokens * setup.batch_size))), 0.0)


def resampled(tokens: Sequence[float], images: int | None, seed: int) -> np.ndarray:
    """Tokens of a data set of so many images, of which those given, (N,) or (N, draws), are a sample; as they are if
    None."""
    tokens = np.asarray(tokens, dtype=np.float64)
    return tokens if images is None else np.random.default_rng((seed, images)).choice(tokens, images)
