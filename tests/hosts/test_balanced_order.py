"""The order that balances tokens: every image once an epoch, equal lists, the same everywhere, less waiting."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_dense.hosts.balanced_order import BalancedOrder, tokens_waited

TOKENS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)
SHAPES = {"ranks": st.integers(1, 5), "batch_size": st.integers(1, 3), "seed": st.integers(0, 2**31)}
FEW = settings(max_examples=60, deadline=None)


def steps_of(order: BalancedOrder, number: int) -> np.ndarray:
    """The first steps: (number, ranks, batch_size)."""
    return np.stack(list(islice(order.steps(), number)))


def shuffled(tokens: list[int], shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Steps as MMEngine and Detectron2 make them without balance."""
    steps, ranks, batch_size = shape
    random, images = np.random.default_rng(seed), steps * ranks * batch_size
    stream = np.concatenate([random.permutation(len(tokens)) for _ in range(images // len(tokens) + 1)])
    return stream[:images].reshape(steps, batch_size, ranks).swapaxes(1, 2)


def waited(tokens: list[int], steps: np.ndarray) -> float:
    return tokens_waited(np.array(tokens)[steps].sum(2)).sum()


@FEW
@given(tokens=TOKENS, **SHAPES)
def test_images_are_seen_equally_often(tokens: list[int], ranks: int, batch_size: int, seed: int) -> None:
    """After any number of steps, so that each epoch is over before the next begins, but for a step that they share."""
    number = 3 * len(tokens) // (ranks * batch_size) + 2
    steps = steps_of(BalancedOrder(tokens, ranks, batch_size, seed), number)
    assert steps.shape == (number, ranks, batch_size)
    for so_far in range(1, number + 1):
        seen = np.bincount(steps[:so_far].ravel(), minlength=len(tokens))
        assert seen.max() - seen.min() <= 1


@FEW
@given(tokens=TOKENS, pool_steps=st.integers(1, 9), **SHAPES)
def test_processes_agree_and_the_order_follows_from_the_seed(
    tokens: list[int], pool_steps: int, ranks: int, batch_size: int, seed: int
) -> None:
    order = BalancedOrder(tokens, ranks, batch_size, seed, pool_steps)
    steps = steps_of(BalancedOrder(tuple(tokens), ranks, batch_size, seed, pool_steps), 12)
    for rank in range(ranks):
        mine = list(islice(order.images_of(rank), 12 * batch_size))
        assert mine == steps[:, rank].ravel().tolist()


@FEW
@given(
    tokens=st.lists(st.integers(0, 1000), min_size=24, max_size=24),
    seed=SHAPES["seed"],
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
)
def test_no_order_of_single_images_waits_less(tokens: list[int], seed: int, ranks: int) -> None:
    """Where epochs fill their steps and are one pool, the neighbours in sorted order wait least."""
    steps = 24 // ranks
    balanced = steps_of(BalancedOrder(tokens, ranks, 1, seed), steps)
    for other in range(20):
        assert waited(tokens, balanced) <= waited(tokens, shuffled(tokens, (steps, ranks, 1), other)) + 1e-9


@FEW
@given(data=st.data(), **SHAPES)
def test_less_is_waited_for_than_in_random_order(data: st.DataObject, ranks: int, batch_size: int, seed: int) -> None:
    size = ranks * batch_size
    tokens = data.draw(st.lists(st.integers(0, 1000), min_size=5 * size, max_size=9 * size))
    shape = (3 * len(tokens) // size, ranks, batch_size)
    balanced = [
        waited(tokens, steps_of(BalancedOrder(tokens, ranks, batch_size, seed + i), shape[0])) for i in range(4)
    ]
    random = [waited(tokens, shuffled(tokens, shape, i)) for i in range(40)]
    assert np.mean(balanced) <= np.mean(random) + 2 * np.std(random) / 40**0.5 + 1e-9


@pytest.mark.parametrize(
    "ranks, batch_size, least", [(2, 1, 0.97), (2, 4, 0.99), (8, 1, 0.96), (8, 4, 0.98), (64, 2, 0.85)]
)
def test_nearly_all_waiting_is_removed(ranks: int, batch_size: int, least: float) -> None:
    tokens = np.random.default_rng(0).integers(300, 1025, 2000).tolist()
    shape = (2000 // (ranks * batch_size), ranks, batch_size)
    balanced = waited(tokens, steps_of(BalancedOrder(tokens, ranks, batch_size, 0), shape[0]))
    assert 1 - balanced / waited(tokens, shuffled(tokens, shape, 0)) >= least


@FEW
@given(tokens=TOKENS, draws=st.integers(1, 3), **SHAPES)
def test_each_epoch_takes_the_next_draw(tokens: list[int], draws: int, ranks: int, batch_size: int, seed: int) -> None:
    images, size = len(tokens), ranks * batch_size
    all_draws = [one + 7 * draw for draw in range(draws) for one in tokens]
    number = 4 * images // size + 2
    steps = steps_of(BalancedOrder(all_draws, ranks, batch_size, seed, draws=draws), number)
    for epoch in range(4):
        # Whole steps, of which the first and the last may be shared with other epochs.
        begin, end = -(-epoch * images // size), (epoch + 1) * images // size
        assert {*(steps[begin:end].ravel() // images)} <= {epoch % draws}
    seen = np.bincount(steps.ravel() % images, minlength=images)
    assert seen.max() - seen.min() <= 1


def test_epochs_and_seeds_differ() -> None:
    order = BalancedOrder(range(60), 2, 3, seed=4)
    first, second = np.split(steps_of(order, 20), 2)
    assert not (first == second).all() and sorted(first.ravel()) == sorted(second.ravel()) == list(range(60))
    assert not (first == steps_of(BalancedOrder(range(60), 2, 3, seed=5), 10)).all()


def test_pools_mix_images_anew_in_each_epoch() -> None:
    """With one pool for all, the neighbours in sorted order would meet in each epoch."""

    def pairs(pool_steps: int) -> int:
        epochs = np.split(steps_of(BalancedOrder(range(400), 2, 1, 0, pool_steps), 400), 2)
        met = [{tuple(sorted(step.ravel())) for step in epoch} for epoch in epochs]
        return len(met[0] & met[1])

    assert pairs(200) == 200 and pairs(10) < 40


def test_no_process_always_has_the_fewest() -> None:
    loads = np.array(range(500))[steps_of(BalancedOrder(range(500), 2, 1, 0), 200)].sum(2)
    assert 0.3 < (loads[:, 0] > loads[:, 1]).mean() < 0.7


@pytest.mark.parametrize(
    "changed, message",
    [({"tokens": []}, "one or more"), ({"tokens": [1, -1]}, "from 0 on"), ({"tokens": [float("nan")]}, "finite"),
     ({"ranks": 0}, "ranks=0: expected at least 1"),
     ({"draws": 0}, "draws=0"), ({"tokens": [1, 2, 3], "draws": 2}, "as many tokens for each of them, not 3"),
     ({"batch_size": 0}, "batch_size=0"), ({"pool_steps": 0}, "pool")],
)  # fmt: skip
def test_nonsense_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedOrder(**{"tokens": [1, 2], "ranks": 1, "batch_size": 1, "seed": 0, **changed})


def test_waiting_is_what_others_could_have_computed() -> None:
    assert tokens_waited(np.array([[3, 1, 2], [2, 2, 2]])).tolist() == [3, 0]
