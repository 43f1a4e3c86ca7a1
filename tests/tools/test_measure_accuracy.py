"""tools/measure_accuracy.py: equal tokens, cosines, mIoU, and rows that survive interruption."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import cv2
import measure_accuracy as tool
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from apt_dense import APTViT, PatchSelector

from evidence import equal_token_rows as comparison
from evidence import feature_similarity as features
from evidence import plot_accuracy_curves as curves
from evidence.match_token_counts import smaller_grid
from evidence.model_forms import Form, check_names, parse_form
from evidence.resumable_rows import KeptRows
from shared.photo_files import evenly_spread, find_photos
from shared.tables import markdown, write_csv
from shared.thresholds_for_share import scores_of, thresholds_for
from support.references import noise, normalise, randomise
from support.threads import one_thread  # noqa: F401

MODEL, SIZE, PATCH = "vit_tiny_patch16_224", (96, 128), 16


def write_photos(folder: Path, size: tuple[int, int] = (100, 140), count: int = 2) -> Path:
    """Noise whose strength falls from left to right."""
    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        strength = np.linspace(0, 100, size[1])[::-1, None] * np.linspace(0.2, 1, size[0])[:, None, None]
        pixels = 120 + strength * rng.uniform(-1, 1, (*size, 3))
        cv2.imwrite(str(folder / f"{i}.png"), pixels.clip(0, 255).astype(np.uint8))
    return folder


# ---- forms and cases


def test_forms_are_names_and_options() -> None:
    assert parse_form("adaptive") == Form("adaptive", {})
    form = parse_form("half: proportional_attention=0.5, scorer='laplacian', thresholds=(0.1, 0.2)")
    assert form == Form("half", {"proportional_attention": 0.5, "scorer": "laplacian", "thresholds": (0.1, 0.2)})
    assert parse_form(form.text) == form


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME or"),
        (": scorer='entropy'", "expected NAME or"),
        ("a: 0.5", "expected NAME or"),
        ("a: scorer=entropy", "expected NAME or"),
        ("a: **{'scorer': 1}", "expected NAME or"),
        ("a: scorer='x'), open('y'", "expected NAME or"),
        ("a: size=3", "APTViT has no option size"),
    ],
)
def test_other_forms_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_form(text)


def test_names_of_forms_are_unique() -> None:
    with pytest.raises(ValueError, match="several forms are called a"):
        check_names([Form("a", {}), Form("b", {}), Form("a", {"scorer": "laplacian"})])


def test_sizes_are_whole_patches() -> None:
    assert comparison.parse_size("504x672") == (504, 672) and comparison.check_size((504, 672), 14) == (36, 48)
    for text in ("504", "x", "504x", "504x0", "a x b", "5.0x6"):
        with pytest.raises(ValueError, match="expected HEIGHTxWIDTH"):
            comparison.parse_size(text)
    with pytest.raises(ValueError, match="500x672 is not a multiple of patches of 14 pixels; try 504x672"):
        comparison.check_size((500, 672), 14)


# ---- equal tokens


@pytest.mark.parametrize("ratios", [(5.5,), (5.5, 4.0)], ids=str)
@pytest.mark.parametrize("share", [0.8, 0.55])
def test_thresholds_leave_just_that_share(ratios: tuple[float, ...], share: float) -> None:
    """As the selector itself counts it; a little less leaves more."""
    selector = PatchSelector(thresholds=ratios, patch_size=8)
    steps = torch.linspace(0, 100, 128)[None, None, None]
    images = [normalise((120 + steps * noise(1, 3, 96, 128, seed=i)).clamp(0, 255).round()) for i in range(2)]
    found = thresholds_for([scores_of(selector, i) for i in images], ratios, share)
    assert len({round(t / ratio, 9) for t, ratio in zip(found, ratios, strict=True)}) == 1

    def kept(factor: float) -> float:
        own = PatchSelector(thresholds=tuple(factor * t for t in found), patch_size=8)
        return sum(own.tokens_kept(image).item() for image in images) / 2

    assert kept(1) <= share < kept(1 - 1e-6)
    assert kept(1) > share - 0.05


def test_a_share_that_nothing_reaches_is_refused() -> None:
    scores = [scores_of(PatchSelector(thresholds=(5.5,)), noise(1, 3, 64, 64))]
    with pytest.raises(ValueError, match="0.2 of the tokens cannot be reached: .* leave 0.250"):
        thresholds_for(scores, (5.5,), 0.2)


@pytest.mark.parametrize("grid", [(36, 48), (26, 34), (1, 9), (60, 80)], ids=str)
@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_a_smaller_grid_has_that_share_and_shape(grid: tuple[int, int], share: float) -> None:
    rows, columns = smaller_grid(grid, share)
    near = [
        (r, c)
        for r in range(1, grid[0] + 1)
        for c in range(1, grid[1] + 1)
        if abs(r - grid[0] * math.sqrt(share)) < 1 and abs(c - grid[1] * math.sqrt(share)) < 1
    ]
    best = min(abs(r * c - share * grid[0] * grid[1]) for r, c in [*near, (rows, columns)])
    assert abs(rows * columns - share * grid[0] * grid[1]) == best


# ---- features


def test_cosine_enlarges_the_smaller_map() -> None:
    expected, found = noise(1, 5, 4, 6), noise(1, 5, 2, 3, seed=1)
    large = torch.zeros(1, 5, 4, 6)
    for y in range(4):
        for x in range(6):
            # Centres of cells, and no cell beyond the edge.
            v, u = max((y + 0.5) / 2 - 0.5, 0), max((x + 0.5) / 2 - 0.5, 0)
            top, left = min(int(v), 1), min(int(u), 2)
            below, right = min(top + 1, 1), min(left + 1, 2)
            upper = (1 - u + left) * found[0, :, top, left] + (u - left) * found[0, :, top, right]
            lower = (1 - u + left) * found[0, :, below, left] + (u - left) * found[0, :, below, right]
            large[0, :, y, x] = (1 - v + top) * upper + (v - top) * lower
    cosines = [
        (large[0, :, y, x] @ expected[0, :, y, x] / large[0, :, y, x].norm() / expected[0, :, y, x].norm()).item()
        for y in range(4)
        for x in range(6)
    ]
    assert features.cosine(found, expected) == pytest.approx(sum(cosines) / 24, abs=1e-6)
    assert features.cosine(expected, expected) == pytest.approx(1, abs=1e-6)


def test_photos_are_cut_to_the_shape_and_never_enlarged(tmp_path: Path) -> None:
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, 20:80] = 200
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    cut = features.photo_at(tmp_path / "a.png", (30, 30))
    assert cut.shape == (1, 3, 30, 30) and (cut == 200).all()
    assert features.photo_at(tmp_path / "a.png", (64, 32)) is None


def test_photos_are_found_in_folders_and_spread_evenly(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "a", count=5)
    (folder / "notes.txt").write_text("no photo")
    found = find_photos([folder, folder / "3.png"], subfolders=True)
    assert [path.stem for path in found] == ["0", "1", "2", "3", "4"]
    assert [path.stem for path in evenly_spread(found, 2)] == ["0", "2"]
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no photos"):
        find_photos([folder / "empty"])


@pytest.fixture(scope="module")
def timms() -> torch.nn.Module:
    return randomise(timm.create_model(MODEL, num_classes=0), 0.05)


def run_features(folder: Path, timms: torch.nn.Module) -> list[str]:
    torch.save(timms.state_dict(), folder / "vit.pth")
    write_photos(folder / "photos")
    return [
        "features", "--model", MODEL, "--weights", str(folder / "vit.pth"), "--photos", str(folder / "photos"),
        "--block", "1", "--sizes", f"{SIZE[0]}x{SIZE[1]}", "--shares", "0.7", "--thresholds", "5.5",
        "--form", "plain", "--form", "half: proportional_attention=0.5", "--out", str(folder / "out"),
    ]  # fmt: skip


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "out" / "rows.jsonl").read_text().splitlines()
    return {row["settings"]["variant"]: row for row in map(json.loads, lines)}


@torch.no_grad()
def test_features_are_compared_with_timms(
    tmp_path: Path, timms: torch.nn.Module, capsys: pytest.CaptureFixture
) -> None:
    arguments = run_features(tmp_path, timms)
    tool.main(arguments)
    rows = rows_of(tmp_path)
    assert list(rows) == ["uniform", "smaller image", "plain", "half"]
    photos = [features.photo_at(path, SIZE) for path in sorted((tmp_path / "photos").iterdir())]

    def block_1(pixels: torch.Tensor) -> torch.Tensor:
        """timm's features of an image whose size the model is made for."""
        model = timm.create_model(MODEL, num_classes=0, img_size=tuple(pixels.shape[-2:]))
        model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(timms.state_dict(), model))
        half = (pixels - 127.5) / 127.5
        return model.eval().forward_intermediates(half, indices=[1], intermediates_only=True)[0]

    expected = [block_1(photo) for photo in photos]
    small = [F.interpolate(p, size=(80, 112), mode="bilinear", antialias=True).round() for p in photos]
    cosines = [features.cosine(block_1(s), e) for s, e in zip(small, expected, strict=True)]
    assert rows["smaller image"]["results"]["tokens"] == pytest.approx(5 * 7 / 48)
    assert rows["smaller image"]["results"]["cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-4)
    for name, power in (("plain", 0.0), ("half", 0.5)):
        result = rows[name]["results"]
        options = {"thresholds": tuple(result["thresholds"]), "out_indices": (1,), "final_norm": False}
        model = APTViT.from_timm(timms, proportional_attention=power, **options).eval()
        images = [normalise(photo, model.pixel_format) for photo in photos]
        cosines = [features.cosine(model(i)[0], e) for i, e in zip(images, expected, strict=True)]
        assert result["cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-4)
        assert result["tokens"] == pytest.approx(sum(model.patches.tokens_kept(i).item() for i in images) / 2)
        assert 0.6 < result["tokens"] <= 0.7 and result["cosine"] < 0.9999
    assert rows["uniform"]["results"]["cosine"] == pytest.approx(1, abs=1e-6)
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out" / "table.md").read_text().strip()
    assert f"| 96x128 | half | 70% | {result['tokens']:.1%} | {result['cosine']:.4f} |" in printed
    assert "| ms |" not in printed
    tool.main([*arguments, "--times"])
    assert "| ms |" in capsys.readouterr().out
    with (tmp_path / "out" / "table.csv").open() as file:
        assert [float(row["cosine"]) for row in csv.DictReader(file)] == [r["results"]["cosine"] for r in rows.values()]


def test_interrupted_it_continues(tmp_path: Path, timms: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, made, real = run_features(tmp_path, timms), [], features.measure

    def measure(model: Any, case: Any, *others: Any) -> dict:
        if case.variant == "plain" and "stop" not in made:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(case.variant)
        return real(model, case, *others)

    monkeypatch.setattr(tool, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tool.main(arguments)
    assert not (tmp_path / "out" / "table.md").exists()
    tool.main(arguments)
    tool.main(arguments)
    assert made == ["uniform", "smaller image", "stop", "plain", "half"]
    tool.main([*arguments, "--form", "whole: proportional_attention=1"])
    assert made[5:] == ["whole"]
    (tmp_path / "photos" / "1.png").write_bytes((tmp_path / "photos" / "0.png").read_bytes())
    tool.main(arguments)
    assert len(made) == 10, "other photos make other rows"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--shares", "1.5"], "--shares"),
        (["--limit", "0"], "--limit 0"),
        (["--sizes", "100x128"], "100x128 is not a multiple of patches of 16 pixels; try 96x128"),
        (["--sizes", "960x1280"], "none of 2 photos is as large"),
        (["--shares", "0.2"], "cannot be reached"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--photos", "nowhere"], "nowhere does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said_in_a_line(
    changes: list[str], message: str, tmp_path: Path, timms: torch.nn.Module
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([*run_features(tmp_path, timms), *changes])
    assert message in str(ended.value.code) and "\n" not in str(ended.value.code)


# ---- rows


def test_rows_are_kept_by_their_settings(tmp_path: Path) -> None:
    kept = KeptRows(tmp_path / "a" / "rows.jsonl")
    assert kept.get({"x": 1}) is None
    kept.add({"x": 1, "y": [1, 2]}, {"z": 0.5})
    kept.add({"x": 2}, {"z": None})
    for rows in (kept, KeptRows(tmp_path / "a" / "rows.jsonl")):
        assert rows.get({"y": [1, 2], "x": 1}) == {"x": 1, "y": [1, 2], "z": 0.5}
        assert rows.get({"x": 2}) == {"x": 2, "z": None} and rows.get({"x": 3}) is None
    (tmp_path / "rows.jsonl").write_text('{"settings": {}, "results": {}}\n{"settings"')
    with pytest.raises(ValueError, match="rows.jsonl, line 2, is not a row"):
        KeptRows(tmp_path / "rows.jsonl")


def test_tables_leave_out_what_no_row_has(tmp_path: Path) -> None:
    rows = [{"a_b": "x|y", "c": 0.256, "d": None}, {"a_b": "z", "c": None, "d": None}]
    assert markdown(rows, {"a_b": "{}", "c": "{:.1%}", "d": "{}"}).splitlines() == [
        "| a b | c |", "| --- | --- |", "| x/y | 25.6% |", "| z |  |",
    ]  # fmt: skip
    write_csv(rows, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == ["a_b,c,d", "x|y,0.256,", "z,,"]


# ---- curves


def rows_with(leads: list[float], shares: tuple[float, ...] = (0.8, 0.6, 0.4)) -> list[dict]:
    rival = [{"size": "2x2", "variant": "smaller image", "share": s, "tokens": s, "ms": s, "m": s} for s in shares]
    form = [{**row, "variant": "a", "m": row["m"] + lead} for row, lead in zip(rival, leads, strict=True)]
    return [{"size": "2x2", "variant": "uniform", "share": 1.0, "tokens": 1.0, "ms": 1.0, "m": 1.0}, *rival, *form]


@pytest.mark.parametrize(
    ("leads", "words"),
    [
        ([0.1, 0.2, 0.3], "ahead of the smaller image at all shares"),
        ([-0.1, 0.0, -0.3], "ahead of the smaller image at no share"),
        ([0.3, 0.1, -0.1], "ahead of the smaller image above about 50% of the tokens"),
        ([-0.1, 0.3, 0.5], "ahead of the smaller image below about 75% of the tokens"),
    ],
    ids=str,
)
def test_where_a_form_is_ahead_is_said(leads: list[float], words: str) -> None:
    assert list(comparison.crossings(rows_with(leads), "m")) == [f"At 2x2 a is {words}"]


@pytest.mark.parametrize("against_time", [False, True])
def test_curves_are_drawn(against_time: bool, tmp_path: Path) -> None:
    curves.plot(rows_with([0.3, 0.1, -0.1]), "m", tmp_path / "curves.png", against_time)
    height, width, _ = cv2.imread(str(tmp_path / "curves.png")).shape
    assert width / height == pytest.approx(5.2 / 4.2 * (1 + against_time), rel=0.01)


@pytest.mark.parametrize("times", [{"ms": 3.0}, {}], ids=str)
def test_trained_rows_whose_names_differ_in_a_share_are_one_curve(
    times: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "uniform", "blocks 80 %, as it is", "blocks, as it is", "smaller image 62.5 %", "smaller image"
    lines = [{"row": name, "share": 1 / n, "mIoU": 50.0 + n, **times} for n, name in enumerate(names, 1)]
    curves.plot_trained(lines, "2x2", "mIoU", tmp_path / "curves.png", against_time=bool(times))
    height, width, _ = cv2.imread(str(tmp_path / "curves.png")).shape
    assert width / height == pytest.approx(5.2 / 4.2 * (1 + bool(times)), rel=0.01)
    drawn: list[dict] = []
    monkeypatch.setattr(curves, "plot", lambda points, *_, **__: drawn.extend(points))
    curves.plot_trained(lines, "2x2", "mIoU", tmp_path / "curves.png")
    variants = ["uniform", "blocks, as it is", "blocks, as it is", "smaller image", "smaller image"]
    assert [point["variant"] for point in drawn] == variants
    assert [point["mIoU"] for point in drawn] == [51, 52, 53, 54, 55]
