"""Random numbers that follow from seeds alone, so that a resumed run draws what an uninterrupted one would have."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_numbers(*seed: int) -> Iterator[None]:
    """Seed the random numbers of Python, NumPy and torch (CPU) for the body, and restore their state afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            seed_all(*seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_all(*seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices, from several non-negative numbers at once."""
    first, second, third = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)
