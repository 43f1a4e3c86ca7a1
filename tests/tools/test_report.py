"""report: every figure of the page is found again in another way, and the page is opened in a browser."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

for package in ("tqdm", "cv2"):
    pytest.importorskip(package, reason="report needs it")

import report

from apt_dense import APTViT, PatchSelector
from apt_dense.drawing import scale_colour

from benchmarks.meters import gflops_of
from reporting import measured_speed
from reporting.photo_figures import PhotoFigures, summarise
from reporting.predicted_speed import MODELS, flops
from shared.normalise import normalise, to_grey_levels
from shared.photo_files import read_photo
from support.browser import ask_page, needed_browser
from support.read_page import Page, number

THRESHOLDS = (5.2, 4.6)
SELECTOR = PatchSelector(patch_size=8, thresholds=THRESHOLDS)
HOSTILE = "<script>document.title='x'<img src=x onerror=alert(1)>&amp;\u202e\n\".png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photos from flat to noisy, whose sides are no whole numbers of large patches, and a broken one."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("report") / "photos"
    (folder / "more").mkdir(parents=True)
    for place in range(8):
        amount = rng.uniform(0, 4 * place, (7, 9, 1)).repeat(16, 0).repeat(16, 1)
        picture = (128 + amount * rng.standard_normal((112, 144, 3)))[: 107 if place in (1, 2) else 112]
        name = HOSTILE if place == 3 else f"more/{place}.png" if place % 2 else f"{place}.png"
        data = cv2.imencode(".png", picture.clip(0, 255).astype(np.uint8))[1].tobytes()
        (folder / name.replace("more/5", "more/4")).write_bytes(data)  # two photos of one name
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    return folder


@pytest.fixture(scope="module")
def masks(photos: Path) -> Path:
    rng, folder = np.random.default_rng(1), photos.parent / "masks"
    folder.mkdir()
    for path in readable(photos):
        rows, columns = read_photo(path).shape[:2]
        labels = rng.integers(0, 3, (7, 9)).repeat(16, 0).repeat(16, 1)[:rows, :columns].astype(np.uint8)
        labels[labels == 2] = 255
        cv2.imwrite(str(folder / "part.png"), labels)
        mask = folder / path.relative_to(photos)
        mask.parent.mkdir(exist_ok=True)
        (folder / "part.png").rename(mask)
    cv2.imwrite(str(folder / "broken.png"), labels)
    return folder


def readable(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


def run(photos: Path, out: Path, *more: str) -> Page:
    with pytest.raises(SystemExit, match="1 of 9 photos were left out"):
        report.main([str(photos), "--out", str(out), *more])
    return Page((out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(photos: Path, masks: Path) -> Page:
    options = "--patch-size", "8", "--thresholds", *map(str, THRESHOLDS), "--drawn", "3", "--masks", str(masks)
    return run(photos, photos.parent / "out", *options)


# ---- the same figures in another way


def image_of(path: Path) -> Tensor:
    return normalise(to_grey_levels(read_photo(path)), SELECTOR.pixel_format)


def count_by_loops(path: Path, selector: PatchSelector) -> list[int]:
    """Patches of each size: blocks of the scale map are counted at their first cells."""
    scale_map, counts = selector.scale_map(image_of(path))[0].tolist(), [0] * selector.num_scales
    for y, row in enumerate(scale_map):
        for x, scale in enumerate(row):
            if y % 2**scale == 0 and x % 2**scale == 0:
                counts[scale] += 1
    return counts


def cells_of(path: Path) -> int:
    rows, columns = read_photo(path).shape[:2]
    return math.ceil(rows / 8) * math.ceil(columns / 8)


@pytest.fixture(scope="module")
def counts(photos: Path) -> dict[Path, list[int]]:
    """Photo -> its patches by size, those that keep most tokens first."""
    found = {path: count_by_loops(path, SELECTOR) for path in readable(photos)}
    return dict(sorted(found.items(), key=lambda item: -sum(item[1]) / cells_of(item[0])))


def shares_of(counts: dict[Path, list[int]]) -> list[float]:
    return [100 * sum(each) / cells_of(path) for path, each in counts.items()]


def near(text: str, expected: float, digits: int = 1) -> bool:
    return abs(number(text) - expected) <= 0.5 * 10**-digits + 1e-9


def test_every_photo_has_its_counts(page: Page, counts: dict[Path, list[int]]) -> None:
    head = ["photo", "pixels", "tokens", "of", "kept", "8 px", "16 px", "32 px", "times as fast"]
    assert page.heads["photos"] == head
    assert len(page.tables["photos"]) == len(counts) == 8 and len({tuple(each) for each in counts.values()}) > 4
    for row, (path, patches), share in zip(page.tables["photos"], counts.items(), shares_of(counts), strict=True):
        rows, columns = read_photo(path).shape[:2]
        assert row[1] == f"{columns} \u00d7 {rows}" and near(row[4], share)
        assert list(map(int, (*row[2:4], *row[5:8]))) == [sum(patches), cells_of(path), *patches]


def test_the_summary_is_that_of_all_photos(page: Page, counts: dict[Path, list[int]]) -> None:
    shares = shares_of(counts)
    figures = dict(page.tables["summary"])
    assert near(figures["share of tokens kept, mean over photos"], sum(shares) / 8) and figures["photos"] == "8"
    for text, most in (("5 %", 0.05), ("half", 0.5), ("95 %", 0.95)):
        expected = min(share for share in shares if sum(other <= share for other in shares) >= 8 * most)
        assert near(figures[f"{text} of the photos keep at most"], expected), text
    assert int(figures["tokens of all photos"]) == sum(map(sum, counts.values()))
    assert int(figures["tokens of all photos in a uniform ViT"]) == sum(map(cells_of, counts))
    assert page.texts["h1"] == [f"Patches of 8 photos: {figures['share of tokens kept, mean over photos']} of the "
                                "tokens kept"] == page.texts["title"][:1]  # fmt: skip
    assert page.texts["dd"][0].startswith(figures["share of tokens kept, mean over photos"])


def test_quantiles_are_shares_that_so_many_photos_do_not_exceed() -> None:
    rng = np.random.default_rng(0)
    for number_of_photos in (1, 2, 40, 41):
        tokens = rng.integers(1, 101, number_of_photos).tolist()
        found = summarise([PhotoFigures(Path(), (80, 80), 100, (each,)) for each in tokens])
        for quantile, least in zip(found.quantiles, (0.05, 0.5, 0.95), strict=True):
            within = [each / 100 for each in tokens if sum(o <= each for o in tokens) >= least * number_of_photos]
            assert quantile == min(within)
        assert found.by_factor == () and found.mixing is None


def test_the_histogram_counts_photos(page: Page, counts: dict[Path, list[int]]) -> None:
    expected = [0] * 20
    for share in shares_of(counts):
        expected[19 if share >= 95 else int(share / 5)] += 1
    assert [(row[0], int(row[1])) for row in page.tables["histogram"]] == [
        (f"{5 * place} to {5 * place + 5} %", count) for place, count in enumerate(expected)
    ]
    heights = [float(bar["height"]) for bar in page.named("rect", "bar")]
    tall = [count for count in expected if count]
    assert heights == pytest.approx([144 * count / max(tall) for count in tall], abs=0.01)
    feet = [float(bar["y"]) + float(bar["height"]) for bar in page.named("rect", "bar")]
    assert feet == pytest.approx([168] * len(tall), abs=0.02)
    assert str(max(tall)) in page.texts["text"], "the axis says how many the tallest bar stands for"
    lefts = [float(bar["x"]) for bar in page.named("rect", "bar")]
    places = [place for place, count in enumerate(expected) if count]
    assert np.diff(lefts) == pytest.approx(np.diff(places) * 356 / 20, abs=0.02)


def test_sizes_are_those_of_all_photos(page: Page, counts: dict[Path, list[int]]) -> None:
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    area = [count * 4**scale for scale, count in enumerate(total)]
    assert sum(area) == sum(map(cells_of, counts)), "no cell is in two patches"
    for row, size, count, cells in zip(page.tables["sizes"], (8, 16, 32), total, area, strict=True):
        assert row[:2] == [f"{size} px", str(count)]
        assert near(row[2], 100 * cells / sum(area)) and near(row[3], 100 * count / sum(total))
    widths = [float(part["width"]) for part in page.named("rect", "part")]
    assert widths == pytest.approx(
        [390 * each / sum(area) for each in area] + [390 * each / sum(total) for each in total], abs=0.01
    )


def test_other_thresholds_keep_what_the_curve_says(page: Page, counts: dict[Path, list[int]]) -> None:
    drawn = [point.split(",") for point in page.named("polyline")[0]["points"].split()]
    assert len(page.tables["curve"]) == len(drawn) == 9
    for step, (row, (_, y)) in enumerate(zip(page.tables["curve"], drawn, strict=True)):
        factor = 2 ** ((step - 4) / 4)
        selector = PatchSelector(patch_size=8, thresholds=tuple(factor * each for each in THRESHOLDS))
        share = sum(100 * sum(count_by_loops(path, selector)) / cells_of(path) for path in counts) / 8
        assert near(row[0], factor, 2) and near(row[2], share), factor
        assert [float(each) for each in row[1].split(" / ")] == pytest.approx(selector.thresholds, rel=5e-3)
        assert float(y) == pytest.approx(168 - 144 * share / 100, abs=0.06)


def entropy_by_loops(picture: np.ndarray, size: int) -> Iterator[float]:
    grey = picture.astype(np.float32) @ np.array((0.2989, 0.5870, 0.1140), np.float32)
    for top in range(0, grey.shape[0] - size + 1, size):
        for left in range(0, grey.shape[1] - size + 1, size):
            levels = Counter((2 * grey[top : top + size, left : left + size]).astype(int).ravel().tolist())
            yield -sum(n / size**2 * math.log2(n / size**2) for n in levels.values())


def padded(picture: np.ndarray) -> np.ndarray:
    """To whole patches, with the colour that normalised zeros are."""
    rows, columns = (-side % 8 for side in picture.shape[:2])
    mean = np.rint(SELECTOR.pixel_mean).astype(np.uint8)
    return np.stack([np.pad(picture[..., c], ((0, rows), (0, columns)), constant_values=mean[c]) for c in range(3)], 2)


def test_cards_show_the_scores_of_their_photos(page: Page, counts: dict[Path, list[int]]) -> None:
    drawn = [list(counts)[place] for place in (0, 4, 7)]
    assert [name for name in page.tables if name.startswith("photo-")] == ["photo-1", "photo-2", "photo-3"]
    for card, path in enumerate(drawn, start=1):
        rows, cells = page.tables[f"photo-{card}"], cells_of(path)
        assert rows[0][3:] == ["\u2013"] * 4
        for scale, (row, patches) in enumerate(zip(rows, counts[path], strict=True)):
            assert row[:2] == [f"{8 << scale} px", str(patches)] and near(row[2], 100 * patches * 4**scale / cells)
            if scale:
                scores, threshold = list(entropy_by_loops(padded(read_photo(path)), 8 << scale)), THRESHOLDS[scale - 1]
                assert row[3] == f"{threshold:g}"
                assert [float(row[4]), float(row[5])] == pytest.approx([min(scores), max(scores)], abs=0.006)
                assert row[6] == f"{sum(score < threshold for score in scores)} of {len(scores)}"


def test_pictures_show_the_patches_and_the_scores(page: Page, counts: dict[Path, list[int]]) -> None:
    pictures = page.pictures()
    assert len(pictures) == 3 * 4 and all(".png" in image["alt"] for image in page.named("img"))
    path = list(counts)[4]
    grid, photo, *scores = pictures[4:8]
    assert np.abs(photo.astype(int) - read_photo(path)).mean() < 12, "the photo, as JPEG"
    scale_map = SELECTOR.scale_map(image_of(path))[0].numpy()
    shown = grid.shape[1] // scale_map.shape[1]
    for scale in (1, 2):
        y, x = (scale_map == scale).nonzero()
        tint = np.array([grid[int((a + 0.5) * shown), int((b + 0.5) * shown)] for a, b in zip(y, x, strict=True)])
        plain = [photo[8 * a : 8 * a + 8, 8 * b : 8 * b + 8].mean((0, 1)) for a, b in zip(y, x, strict=True)]
        towards = np.array(scale_colour(scale)) - np.array(plain).mean(0)
        assert ((tint.mean(0) - np.array(plain).mean(0)) * towards).sum() > 0, "tinted by its size"
    for scale, coloured in enumerate(scores, start=1):
        flat = [score < THRESHOLDS[scale - 1] for score in entropy_by_loops(padded(read_photo(path)), 8 << scale)]
        rows, columns = (side >> scale for side in scale_map.shape)
        assert coloured.shape[:2] == scale_map.shape
        first = coloured[: rows << scale : 1 << scale, : columns << scale : 1 << scale].reshape(-1, 3).astype(int)
        assert [bool(blue > red) for red, _, blue in first] == flat
        assert any(flat) and not all(flat)


def test_predicted_speed_is_that_of_counted_operations(
    page: Page, counts: dict[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the rows by which some processors' kernels fill theirs up.
    for module in ("onednn_matmul", "kernels.cpu_sliced"):
        monkeypatch.setattr(f"apt_dense.ops.{module}.whole_rows", lambda rows: rows)
    size, images, total = MODELS["tiny"], {path: image_of(path) for path in counts}, []
    # Without positions, whose resampling to the photo's grid is a small product, too.
    model = APTViT(img_size=144, patch_size=8, thresholds=THRESHOLDS, use_abs_pos=False, **size._asdict()).eval()
    for thresholds in ((), THRESHOLDS):
        model.set_patches(thresholds=thresholds)
        with torch.inference_mode():
            found = {path: 1e9 * gflops_of(lambda image=image: model(image)) for path, image in images.items()}
        for path, operations in found.items():
            per_scale = counts[path] if thresholds else [cells_of(path)]
            assert flops(size, 8, cells_of(path), per_scale) == pytest.approx(operations, rel=5e-3)
        total.append(sum(found.values()))
    shown = dict(page.tables["speed"])
    assert list(shown) == ["ViT-tiny", "ViT-small", "ViT-base", "ViT-large"]
    assert number(shown["ViT-tiny"]) == pytest.approx(total[0] / total[1], rel=0.01)
    tokens = sum(map(cells_of, counts)) / sum(map(sum, counts.values()))
    assert number(shown["ViT-large"]) == pytest.approx(tokens, rel=0.1), "the wider, the nearer to the tokens"
    assert page.texts["dd"][1].startswith(shown["ViT-base"])


def test_labels_are_those_under_coarse_patches(
    page: Page, photos: Path, masks: Path, counts: dict[Path, list[int]]
) -> None:
    coarse = mixed = under = borders = 0
    for path in counts:
        mask = (masks / path.relative_to(photos)).read_bytes()
        labels = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED)
        scale_map = SELECTOR.scale_map(image_of(path))[0].tolist()
        for y, row in enumerate(scale_map):
            for x, scale in enumerate(row):
                if scale and y % 2**scale == 0 and x % 2**scale == 0:
                    part = labels[8 * y : 8 * y + (8 << scale), 8 * x : 8 * x + (8 << scale)]
                    coarse, mixed = coarse + 1, mixed + (len(set(part.ravel().tolist()) - {255}) > 1)
        for y in range(labels.shape[0]):
            for x in range(labels.shape[1]):
                around = [labels[y + 1, x]] if y + 1 < labels.shape[0] else []
                around += [labels[y, x + 1]] if x + 1 < labels.shape[1] else []
                if labels[y, x] != 255 and any(other not in (255, labels[y, x]) for other in around):
                    borders, under = borders + 1, under + (scale_map[y // 8][x // 8] > 0)
    rows = page.tables["labels"]
    assert [int(row[1]) for row in rows] == [coarse, mixed, borders, under] and 0 < mixed < coarse
    assert near(rows[1][2], 100 * mixed / coarse) and near(rows[3][2], 100 * under / borders)
    assert page.texts["dd"][2].startswith(rows[1][2])


def test_measured_speed_is_that_of_the_patches(
    photos: Path, tmp_path: Path, counts: dict[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that counts the tokens of the blocks instead of seconds."""
    tokens, plain = [0], measured_speed.APTViT

    def counting(**options: object) -> APTViT:
        model = plain(**{**options, "embed_dim": 16, "depth": 1, "num_heads": 2})
        # The second argument is the layout; rows are filled up for some processors.
        model.blocks[0].register_forward_pre_hook(lambda _, given: tokens.append(tokens.pop() + len(given[1].image_N)))
        return model

    monkeypatch.setattr(measured_speed, "APTViT", counting)
    monkeypatch.setattr(measured_speed.time, "perf_counter", lambda: tokens[0] / 1000)
    options = "--patch-size", "8", "--thresholds", *map(str, THRESHOLDS), "--drawn", "0", "--measure", "tiny"
    page = run(photos, tmp_path / "out", *options)
    timed = [list(counts)[place] for place in (0, 2, 4, 6)]
    for row, path in zip(page.tables["measured"], timed, strict=True):
        assert list(map(float, row[1:3])) == [cells_of(path), sum(counts[path])]
        assert near(row[3], cells_of(path) / sum(counts[path]), 2)
        ways = [cells_of(path)], counts[path]
        uniform, adaptive = (flops(MODELS["tiny"], 8, cells_of(path), way) for way in ways)
        assert near(row[4], uniform / adaptive, 2)
    assert near(page.texts["dd"][2], sum(map(cells_of, timed)) / sum(sum(counts[path]) for path in timed), 2)
    uniform, adaptive = (
        sum(flops(MODELS["tiny"], 8, cells_of(path), way(path)) for path in timed)
        for way in (lambda path: [cells_of(path)], counts.get)
    )
    assert f"4 photos with {uniform / adaptive:.2f} \u00d7 predicted" in page.texts["dd"][2]


# ---- what else pages are made of


def test_a_calibration_brings_thresholds_and_what_it_expected(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="calibrate draws with it")
    import calibrate

    out = tmp_path / "calibrated"
    calibrate.main([str(photos), "--out", str(out), "--workers", "0", "--patch-size", "8", "--tokens", "0.6"])
    found = json.loads((out / "thresholds.json").read_text())
    page = run(photos, tmp_path / "out", "--calibration", str(out), "--drawn", "0")
    figures = dict(page.tables["calibration"])
    assert near(figures["these photos keep"], 60, 0) and figures["tokens that they keep"] == "60.0 %"
    low, high = (number(figures[f"as many others should keep at {way}"]) for way in ("least", "most"))
    assert [low, high] == pytest.approx([100 * each for each in found["expected"]], abs=0.051)
    assert page.tables["curve"][4][1] == " / ".join(f"{each:.3g}" for each in found["thresholds"])
    assert "is what the calibration expected" in " ".join(page.texts["p"])
    (out / "thresholds.json").write_text(json.dumps({**found, "expected": [0.1, 0.2]}))
    page = run(photos, tmp_path / "out", "--calibration", str(out), "--drawn", "0")
    assert "another share than the calibration expected" in " ".join(page.texts["p"])
    with pytest.raises(SystemExit) as ended:
        report.main([str(photos), "--out", str(tmp_path / "out"), "--calibration", str(out), "--size", "64"])
    assert ended.value.code == 2


def test_a_budget_has_no_thresholds_to_compare_with(photos: Path, tmp_path: Path) -> None:
    options = "--patch-size", "8", "--thresholds", *map(str, THRESHOLDS)
    page = run(photos, tmp_path / "out", *options, "--budget", "0.5", "--drawn", "1")
    selector = PatchSelector(patch_size=8, thresholds=THRESHOLDS, token_budget=0.5)
    for row in page.tables["photos"]:
        assert 0.48 < int(row[2]) / int(row[3]) < 0.52
    path = next(path for path in readable(photos) if path.name == page.tables["photos"][0][0])
    assert [int(row[1]) for row in page.tables["photo-1"]] == count_by_loops(path, selector)
    assert "curve" not in page.tables and {row[6] for row in page.tables["photo-1"]} == {"\u2013"}


def test_a_config_brings_all_that_decides_about_patches(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="reads a config of MMSegmentation")
    options = {"patch_size": 8, "thresholds": THRESHOLDS, "window_size": 6, "min_tokens": 0.3}
    backbone = {"type": "APTViT", "window_block_indexes": [0], **options}
    (tmp_path / "config.py").write_text(f"model = dict(backbone={backbone!r})")
    page = run(photos, tmp_path / "out", "--config", str(tmp_path / "config.py"), "--drawn", "0")
    found = {path: PatchSelector(**options).count(image_of(path))[0].tolist() for path in readable(photos)}
    assert sorted(row[5:8] for row in page.tables["photos"]) == sorted(list(map(str, each)) for each in found.values())
    assert found != {path: SELECTOR.count(image_of(path))[0].tolist() for path in found} and "curve" not in page.tables


def test_quality_is_shown_as_it_is_given(photos: Path, tmp_path: Path) -> None:
    given = {"mIoU": {"fine": 75.25, "coarse": 64}, "<b>": {"fine": 1}, "aAcc": 91.5}
    (tmp_path / "quality.json").write_text(json.dumps(given))
    page = run(photos, tmp_path / "out", "--quality", str(tmp_path / "quality.json"), "--drawn", "0")
    assert page.heads["quality-by-scale"] == ["", "fine", "coarse"]
    assert page.tables["quality-by-scale"] == [["mIoU", "75.25", "64"], ["<b>", "1", "\u2013"]]
    assert page.tables["quality"] == [["aAcc", "91.5"]]


def test_what_an_evaluation_by_scale_writes_is_sorted_by_part(photos: Path, tmp_path: Path) -> None:
    given = {"mIoU_coarse": 64, "aAcc": 91.5, "mIoU": 70, "mIoU_fine": 75.25, "AP_mixed": 0.5, "small_objects_fine": 3}
    (tmp_path / "quality.json").write_text(json.dumps(given))
    page = run(photos, tmp_path / "out", "--quality", str(tmp_path / "quality.json"), "--drawn", "0")
    assert page.heads["quality-by-scale"] == ["", "coarse", "all", "fine", "mixed"]
    assert page.tables["quality-by-scale"] == [
        ["mIoU", "64", "70", "75.25", "\u2013"], ["AP", "\u2013", "\u2013", "\u2013", "0.5"],
        ["small_objects", "\u2013", "\u2013", "3", "\u2013"],
    ]  # fmt: skip
    assert page.tables["quality"] == [["aAcc", "91.5"]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("quality", '{"mIoU": "high"}', "mIoU is 'high'; expected a number"),
        ("quality", "[1]", "holds list; expected an object"),
        ("quality", "{", "is not JSON"),
        ("calibration", "{}", "expected an object with figures"),
        ("calibration", '{"thresholds": [1]}', "is not what tools/calibrate.py writes"),
    ],
)
def test_files_that_hold_something_else_are_named(
    photos: Path, tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=said) as ended:
        report.main([str(photos), "--out", str(tmp_path / "out"), f"--{name}",
                     str(tmp_path if name == "calibration" else path)])  # fmt: skip
    assert str(path) in str(ended.value) and not (tmp_path / "out").exists()


# ---- names, writing, browsers


def test_names_are_text_and_tell_photos_apart(page: Page, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [row[0] for row in page.tables["photos"]]
    shown = HOSTILE.replace("\u202e", r"\u202e").replace("\n", r"\u000a")
    twins = {str(photos / "4.png"), str(photos / "more" / "4.png")}
    assert shown in names and len(set(names)) == 8 and twins < set(names)
    assert not page.named("script") and all(image["src"].startswith("data:image/") for image in page.named("img"))
    for name, attributes in page.elements:
        assert not {"href", "onerror", "onload"} & attributes.keys() and name not in ("a", "link", "iframe", "object")
    ((path, reason),) = page.tables["left-out"]
    assert path == str(photos / "broken.jpg") and "is not a readable photograph" in reason


def test_a_page_appears_whole_or_not_at_all(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(photos, tmp_path / "out", "--drawn", "1")
    before, plain = (tmp_path / "out" / "report.html").read_bytes(), Path.write_text

    def half(self: Path, text: str, **options: object) -> None:
        plain(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(SystemExit, match="No space left"):
        report.main([str(photos), "--out", str(tmp_path / "out"), "--drawn", "0"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert (tmp_path / "out" / "report.html").read_bytes() == before


def test_photos_of_which_none_can_be_read_make_no_page(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="none of 1 photos can be read"):
        report.main([str(photos / "broken.jpg"), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())


LOOK = """
const seen = page.document, root = seen.documentElement;
for (const details of seen.querySelectorAll("details")) details.open = true;
await Promise.all([...seen.images].map(image => image.decode()));
const rows = id => [...seen.querySelectorAll(`#${id} tbody tr`)].map(
  row => [...row.cells].map(cell => cell.textContent));
return {title: seen.title, wide: root.scrollWidth, room: root.clientWidth,
        loaded: page.performance.getEntriesByType("resource").map(entry => entry.name),
        widths: [...seen.images].map(image => image.naturalWidth), photos: rows("photos"), sizes: rows("sizes"),
        scripts: seen.scripts.length, small: Math.min(...[...seen.querySelectorAll("svg text, td, p")].map(text =>
          text.getBoundingClientRect().height))};
"""


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page(page: Page, photos: Path, width: int) -> None:
    needed_browser()
    text = (photos.parent / "out" / "report.html").read_text(encoding="utf-8")
    seen, requests = ask_page("/report.html", LOOK, width, {"/report.html": text})
    assert seen["title"] == page.texts["title"][0] and seen["scripts"] == 0
    assert seen["photos"] == page.tables["photos"] and seen["sizes"] == page.tables["sizes"]
    assert seen["wide"] <= seen["room"], "nothing sticks out"
    assert len(seen["widths"]) == 12 and all(seen["widths"])
    assert all(name.startswith("data:") for name in seen["loaded"])
    assert {*requests} <= {"/around", "/report.html", "/favicon.ico"}
    assert seen["small"] > 9, "text that can be read"
