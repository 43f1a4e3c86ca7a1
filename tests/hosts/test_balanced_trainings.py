"""Real trainings of two processes with both hosts, balanced and not: what they read, and the tokens they wait for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmseg", reason="trains with both hosts")

from apt_dense.hosts.balanced_order import tokens_waited

from support.threads import one_thread  # noqa: F401 (a fixture)
from support.tiny_trainings import NAMES
from support.two_processes import Process, train, write_det, write_seg

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]  # warnings: the hosts' own
IMAGES, EPOCHS = 16, 2
STEPS = IMAGES // 2 * EPOCHS


def argv_of(name: str, folder: Path, balance: bool, augmented: bool) -> list[str]:
    counts = ["--balance", str(folder / "tokens.json")] if balance else []
    counts += ["--balance-draws", "2"] if balance and augmented else []
    if name == "seg":
        return [*write_seg(folder, IMAGES, augmented), "--max-iters", str(STEPS), *counts]
    argv = write_det(folder, IMAGES, f"train.max_iter={STEPS}", augmented=augmented)
    return [*argv[:2], *counts, *argv[2:]]


def waited(processes: list[Process]) -> float:
    loads = np.array([process.tokens for process in processes]).T
    assert loads.shape == (STEPS, 2)
    return tokens_waited(loads).sum() / loads.sum()


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("name", NAMES[:2])
def test_balance_removes_waiting_and_keeps_all_images(name: str, augmented: bool, tmp_path: Path) -> None:
    """Of the images as they are, and with the random scales and crops of the hosts' configs, two of each counted."""
    random, balanced = (
        train(name, argv_of(name, tmp_path / kind, kind == "balanced", augmented), tmp_path / kind / "out")
        for kind in ("random", "balanced")
    )
    for processes in (random, balanced):
        for epoch in range(EPOCHS):
            part = slice(epoch * STEPS // EPOCHS, (epoch + 1) * STEPS // EPOCHS)
            seen = sorted(image % IMAGES for process in processes for image in process.images[part])
            assert seen == list(range(IMAGES))
    assert balanced[0].images[: STEPS // 2] != balanced[0].images[STEPS // 2 :]
    assert waited(random) > 0.1
    assert waited(balanced) <= 0.2 * waited(random), (waited(balanced), waited(random))
