"""Random numbers follow from seeds alone."""

from __future__ import annotations

import random

import numpy as np
import torch

from apt_dense.hosts.randomness_from_seeds import random_numbers, seed_all


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seeds_decide_about_all_three_generators() -> None:
    found = []
    for seed in ((1, 2), (1, 2), (2, 1), (1, 2, 3)):
        seed_all(*seed)
        found.append(drawn())
    assert found[0] == found[1] and all(a != b for other in found[2:] for a, b in zip(found[0], other, strict=True))


def test_the_state_outside_is_kept_also_after_an_error() -> None:
    seed_all(5)
    expected = [drawn(), drawn()]
    seed_all(5)
    first = drawn()
    try:
        with random_numbers(7):
            drawn()
            raise KeyError
    except KeyError:
        assert [first, drawn()] == expected
