"""tools/compare_scorers.py: what scorers hide against a plain count, the best choice, and wrong arguments."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

import compare_scorers as tool
import numpy as np
import pytest
import torch
from PIL import Image

from apt_dense.patches.scorer_files import as_bytes
from apt_dense.patches.scores import SCORERS

from calibration.scorer_networks import PatchNetwork
from support.markdown_blocks import rows_by_name
from support.threads import one_thread  # noqa: F401

PATCH, SIZE, COUNT = 4, (24, 32), 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that are flat or noisy in blocks of 8 pixels, and masks that mix classes in other blocks."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for number in range(COUNT):
        strength = rng.uniform(0, 100, (SIZE[0] // 8, SIZE[1] // 8)).repeat(8, 0).repeat(8, 1)
        pixels = 128 + strength[..., None] * rng.uniform(-1, 1, (*SIZE, 3))
        mask = (rng.random(SIZE) < strength / 250).astype(np.uint8) + 1
        mask[rng.random(SIZE) < 0.05] = 0
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def arguments(data: Path, out: Path, *scorers: str) -> list[str]:
    argv = ["--images", str(data / "images"), "--masks", str(data / "masks"), "--zero-is-void", "--device", "cpu"]
    argv += ["--size", f"{SIZE[0]}x{SIZE[1]}", "--patch-size", str(PATCH), "--out", str(out)]
    return [*argv, *(word for scorer in scorers for word in ("--scorer", scorer))]


def hidden_of(mask: np.ndarray) -> list[float]:
    """By plain counting: shares of the labelled pixels of each patch that are not of its most frequent class."""
    found = []
    for top in range(0, SIZE[0], 2 * PATCH):
        for left in range(0, SIZE[1], 2 * PATCH):
            labels = Counter(mask[top : top + 2 * PATCH, left : left + 2 * PATCH].flatten().tolist())
            del labels[0]
            found.append(1 - max(labels.values()) / labels.total())
    return found


def plain(data: Path, name: str | None, share: float) -> float:
    """Per cent hidden when the patches with the lowest scores are merged; None for the best choice."""
    each = []
    for number in range(COUNT):
        hidden = hidden_of(np.asarray(Image.open(data / "masks" / f"{number}.png")))
        pixels = np.asarray(Image.open(data / "images" / f"{number}.png"))
        photo = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        scores = hidden if name is None else SCORERS[name](photo, PATCH, [1])[0].flatten().tolist()
        each += zip(scores, hidden, strict=True)
    merged = sorted(each, key=lambda pair: pair[0])[: round((1 - share) / 0.75 * len(each))]
    return 100 * sum(hidden for _, hidden in merged) / sum(hidden for _, hidden in each)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.25])
def test_what_is_hidden_is_as_counted(share: float, data: Path, tmp_path: Path) -> None:
    names = "entropy", "laplacian"
    tool.main([*arguments(data, tmp_path, *names), "--shares", str(share)])
    with (tmp_path / "table.csv").open(newline="") as file:
        found = {row["scorer"]: row for row in csv.DictReader(file)}
    assert list(found) == [*names, tool.BEST]
    for name in names:
        assert float(found[name][f"{share:.0%}"]) == pytest.approx(plain(data, name, share), abs=1e-3)
        assert float(found[name]["ms"]) > 0
    best = float(found[tool.BEST][f"{share:.0%}"])
    assert best == pytest.approx(plain(data, None, share), abs=1e-3) and found[tool.BEST]["ms"] == ""
    assert all(best <= float(found[name][f"{share:.0%}"]) + 1e-6 for name in names)


def test_files_of_scorers_are_compared(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "own.safetensors"
    file.write_bytes(as_bytes(PatchNetwork().scorer()))
    tool.main([*arguments(data, tmp_path / "out", "entropy", str(file)), "--limit", "3"])
    found = rows_by_name(tmp_path / "out" / "table.md")
    assert list(found) == ["entropy", str(file), tool.BEST]
    assert all(0 <= float(row[share]) <= 100 for row in found.values() for share in ("80%", "60%", "40%"))


def test_masks_of_one_class_tell_nothing(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "flat")
    for path in (tmp_path / "flat" / "masks").iterdir():
        Image.fromarray(np.full(SIZE, 3, np.uint8)).save(path)
    with pytest.raises(SystemExit, match="^compare_scorers: no coarse patch of these masks holds two classes"):
        tool.main(arguments(tmp_path / "flat", tmp_path / "out", "entropy"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scorer", "entropy"], "one of them is listed twice"),
        (["--scorer", "nothing"], "scorer='nothing' is unknown; expected one of"),
        (["--scorer", "gone.safetensors"], "gone.safetensors"),
        (["--shares", "0.2"], r"--shares \[0.2\]: expected numbers from 0.25"),
        (["--shares", "1"], r"--shares \[1.0\]: expected numbers from 0.25"),
        (["--size", "24"], "expected HEIGHTxWIDTH"),
        (["--size", "12x32"], "--size 12x32 holds no patch of 16 pixels"),
        (["--masks", "nowhere"], "without a mask in nowhere"),
    ],
)
def test_wrong_arguments_end_in_a_line(more: list[str], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^compare_scorers: .*{message}"):
        tool.main([*arguments(data, tmp_path / "out", "entropy"), *more])
