"""Settings of a run: each bad value is refused by name, as checkpoints and callers may hold any."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from apt_dense.hosts.torchvision.run_settings import Settings

WHOLE = [1.5, "64", True, None, math.nan, [64], -1]
FROM_1 = [0, *WHOLE]
FLAGS = [0, 1, "no", None]
ABOVE_0 = [0, -1.0, math.nan, math.inf, "1", True]
BAD: dict[str, list[Any]] = {
    "task": ["mask", None, 3, ["masks"]],
    "model": [None, 3, True],
    "pretrained": [3, True, ["a.pth"]],
    "patch_size": [0, 1.5, "16", True],
    "thresholds": [5.5, "5.5", None, (3.0, 4.0), (math.nan,), ("4",)],
    "scale_jitter": [1.0, (1.0,), (2.0, 1.0), (0, 1), (math.nan, 1), "ab", None, (1.0, math.inf)],
    "scale_factors": [1.0, (0,), (math.nan,), "21", None, (True,)],
    "expected_tokens": [-0.1, 1.1, "0.5", True, math.nan],
    "anneal": [0.5, (0.5,), (0.6, 0.5), (0, 1.1), (math.nan, 1), "ab", (True, 1), ("0", "1")],
    **dict.fromkeys(["drop_padding", "checkpoint_blocks", "amp"], FLAGS),
    **dict.fromkeys(["channels", "box_features", "proposals", "box_samples", "batch_size", "iterations"], FROM_1),
    "scorer": [None, 3, True],
    "size": [31, *WHOLE],
    "warmup": WHOLE,
    "seed": WHOLE,
    "lr": [*ABOVE_0, None],
    "lr_decay": ABOVE_0,
    "weight_decay": [-0.1, math.nan, "0", True, None],
    "clip": [-1, math.inf, "1", True, None],
}


def test_every_setting_is_covered() -> None:
    assert {item.name for item in fields(Settings)} == set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}="):
            Settings(**{name: value})


def test_good_values_are_brought_to_one_type() -> None:
    """As checkpoints and NumPy hold them, so that equal settings compare as equal."""
    given = Settings(size=np.int64(64), thresholds=[5.5, 4], scale_jitter=[0.1, 2.0], lr=1, seed=np.uint8(0))
    assert given.differences(replace(Settings(), size=64, lr=1.0)) == []
    assert type(given.size) is int and given == pickle.loads(pickle.dumps(given))
    assert given.differences(Settings()) == ["size: 64 against 1024", "lr: 1 against 0.0001"]
