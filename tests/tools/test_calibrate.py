"""calibrate: from photos to thresholds, snippets that work, resuming, and what it says of photos it cannot read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

for package in ("tqdm", "cv2", "matplotlib"):
    pytest.importorskip(package, reason="calibrate needs it")

import calibrate
from visualize import partition_photo

from apt_dense import APTViT, PatchSelector
from apt_dense.hosts.token_counts import read_counts
from apt_dense.patches.calibration import FACTORS

from calibration import thresholds_for_latency as latency
from calibration import token_curves as curves_module
from calibration.curve_record import PhotoCurve, read_curves
from calibration.masks_of_photos import find_masks
from calibration.objects_of_photos import read_objects_of
from calibration.token_curves import Sizes
from shared.photo_files import evenly_spread, find_photos, read_photo
from shared.thresholds_for_share import short


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos in two folders, from flat to noisy, and a broken one."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "photos" / f"part{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        amount = rng.uniform(0, 25, (6, 8, 1)).repeat(16, 0).repeat(16, 1)
        picture = 128 + amount * rng.standard_normal((96, 128, 3))
        cv2.imwrite(str(path), picture.clip(0, 255).astype(np.uint8))
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    return tmp_path / "photos"


def run(photos: Path, out: Path, *more: str) -> dict:
    calibrate.main([str(photos), "--out", str(out), "--workers", "0", "--patch-size", "8", *more])
    return json.loads((out / "thresholds.json").read_text())


def mean_share(photos: Path, thresholds: list[float], sizes: Sizes | None = None) -> float:
    """Cut each photo into patches by itself."""
    selector = PatchSelector(patch_size=8, thresholds=tuple(thresholds))
    sizes = sizes or Sizes()
    found = [partition_photo(sizes.apply(read_photo(p)), selector).tokens_kept for p in sorted(photos.rglob("*.png"))]
    return float(np.mean(found))


def test_the_target_is_met_and_everything_is_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(photos, tmp_path / "out", "--tokens", "0.6")
    said = capsys.readouterr()
    assert mean_share(photos, found["thresholds"]) == pytest.approx(0.6, abs=0.01) and found["images"] == 12
    assert "broken.jpg is not a readable photograph" in said.err and "60.0% on average over 12 photos" in said.out
    assert "in the photos' own sizes; name the size that the model sees" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "curves.jsonl", "histogram.png", "snippets.md", "thresholds.json", "tokens.json", "worst.png",
    ]  # fmt: skip
    tokens, counted_with = read_counts(tmp_path / "out" / "tokens.json")
    assert sum(tokens) / (12 * 12 * 16) == pytest.approx(found["share"], abs=0.05) and len(tokens) == 12
    assert counted_with["thresholds"] == found["thresholds"]
    assert all(cv2.imread(str(tmp_path / "out" / name)).shape[0] > 100 for name in ("histogram.png", "worst.png"))


def test_other_targets(photos: Path, tmp_path: Path) -> None:
    within = Sizes(within=(60, 30))
    assert within.apply(np.zeros((40, 100, 3), np.uint8)).shape == (24, 60, 3)
    square = Sizes(square=64)
    found = run(photos, tmp_path / "a", "--tokens-per-image", "40", "--square", "64")
    assert mean_share(photos, found["thresholds"], square) * 64 == pytest.approx(40, abs=0.7)
    found = run(photos, tmp_path / "b", "--tokens-of-95", "0.8")
    assert found["quantiles"][2] == pytest.approx(0.8, abs=0.002) and found["share"] < 0.8


def test_snippets_are_read_by_their_hosts(photos: Path, tmp_path: Path) -> None:
    found = run(photos, tmp_path / "out", "--tokens", "0.6")
    text = (tmp_path / "out" / "snippets.md").read_text()
    blocks = dict(block.split("\n", 1) for block in text.split("```")[1::2] if block.startswith("python"))
    assert len(text.split("```")[1::2]) == 5 and blocks
    scope: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], {}, scope)
    assert list(scope["model"]["backbone"]["thresholds"]) == found["thresholds"]
    assert scope["custom_hooks"] == [{"type": "TokenDriftHook", "expected": round(found["share"], 3)}]
    expected = f"{found['share']:.3f}"
    assert f"train.expected_tokens = {expected}\n" in text and f"--expected-tokens {expected}\n" in text
    assert f"TokenDriftHook(expected={expected})" in text


def test_an_interrupted_run_continues_with_the_same_result(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(photos, tmp_path / "whole", "--tokens", "0.6")
    measured, plain = [], curves_module._Photos.__getitem__

    def until_the_sixth(self: curves_module._Photos, number: int) -> PhotoCurve:
        measured.append(self.paths[number].name)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return plain(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(curves_module._Photos, "__getitem__", until_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            run(photos, tmp_path / "out", "--tokens", "0.6")
    record = tmp_path / "out" / "curves.jsonl"
    record.write_text(record.read_text() + '{"photo": "cut sho')  # killed in the middle of a line
    assert run(photos, tmp_path / "out", "--tokens", "0.6") == whole
    assert record.read_text() == (tmp_path / "whole" / "curves.jsonl").read_text()


def test_workers_give_the_same_in_the_same_order(photos: Path, tmp_path: Path) -> None:
    """Also after OpenCV has started threads in the main process."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 5)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(photos, one, "--tokens", "0.6") == run(photos, two, "--tokens", "0.6", "--workers", "2")
    assert (one / "curves.jsonl").read_text() == (two / "curves.jsonl").read_text()


def test_another_target_needs_no_measurement(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(photos, tmp_path / "out", "--tokens", "0.6")
    monkeypatch.setattr(curves_module._Photos, "__getitem__", lambda *_: pytest.fail("measured again"))
    assert run(photos, tmp_path / "out", "--tokens", "0.7")["share"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tokens", "1.5"], "share=1.5"),
        (["--tokens", "0.6", "--thresholds", "inf", "3"], "cannot be scaled"),
        (["--tokens", "0.6", "--thresholds", "4", "5"], "rise with the scale"),
        (["--tokens", "0.001"], "is not reached"),
        (["--tokens-per-image", "30"], "give --square"),
        (["--milliseconds", "30"], "give --square"),
        (["--tokens", "0.6", "--scorer", "laplacian"], "--thresholds"),
    ],
)
def test_bad_options_are_named(photos: Path, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        run(photos, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "thresholds.json").exists()


def test_other_settings_are_not_mixed(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", "--tokens", "0.6")
    with pytest.raises(SystemExit, match="longer: None before"):
        run(photos, tmp_path / "out", "--tokens", "0.6", "--size", "64")
    run(photos, tmp_path / "out", "--tokens", "0.6", "--size", "64", "--force")
    record = tmp_path / "out" / "curves.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join([*lines[:3], '{"photo": 1}\n', *lines[3:]]))
    with pytest.raises(SystemExit, match="line 4, is damaged"):
        run(photos, tmp_path / "out", "--tokens", "0.6", "--size", "64")


def test_a_sample_is_spread_over_the_photos(photos: Path) -> None:
    every = find_photos([photos], subfolders=True)
    assert len(every) == 13 and evenly_spread(every, 4) == [every[0], every[3], every[6], every[9]]
    with pytest.raises(ValueError, match="does not exist"):
        find_photos([photos / "missing"])


def test_memory_holds_no_curves(photos: Path, tmp_path: Path) -> None:
    """They are read one by one."""
    run(photos, tmp_path / "out", "--tokens", "0.6")
    head = json.loads((tmp_path / "out" / "curves.jsonl").read_text().splitlines()[0])
    curves = read_curves(tmp_path / "out" / "curves.jsonl", head)
    assert iter(curves) is curves and next(curves).path.endswith("broken.jpg")


CELLS = 200  # of a photo


def milliseconds_of(tokens: np.ndarray) -> np.ndarray:
    return 10 + 0.2 * tokens + 0.001 * tokens**2


def curve_of(photo: int) -> np.ndarray:
    """The patches of a photo at each factor, of two sizes: the later photos are the busier ones."""
    merged = (48 / (1 + FACTORS**-4.0 * 2.0 ** (photo - 6))).round()
    return np.stack([CELLS - 4 * merged, merged, 0 * merged], axis=1).astype(int)


@pytest.mark.parametrize("off", [0, 0.5], ids=["a curve that fits", "times that no curve fits"])
@pytest.mark.parametrize("wanted", [40.0, 55.0, 70.0])
def test_a_time_is_the_mean_over_all_photos(wanted: float, off: float) -> None:
    """Though only those that keep most tokens are timed."""
    curves, statistics = [curve_of(photo) for photo in range(12)], calibrate.CurveStatistics(3)
    for patches in curves:
        statistics.add(patches)

    def tokens_at(factor: float, photos: list[np.ndarray]) -> np.ndarray:
        place = int(np.abs(np.log(FACTORS / factor)).argmin())
        return np.array([patches[place].sum() for patches in photos])

    def clock(factors: list[float]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([tokens_at(factor, curves[-6:]) for factor in factors])
        return tokens, milliseconds_of(tokens) * (1 + off * (tokens > 120))

    selector = PatchSelector(patch_size=8, thresholds=(5.5, 4.0))
    found = latency.search(clock, statistics, selector, wanted, CELLS)
    everything, sample = (tokens_at(found.factor, some) for some in (curves, curves[-6:]))
    assert sample.mean() > 1.05 * everything.mean()
    if off:  # right for the sample where the curve was corrected
        wanted *= milliseconds_of(sample).sum() / clock([found.factor])[1].sum()
    assert milliseconds_of(everything).mean() == pytest.approx(wanted, rel=0.15 if off else 0.02)
    with pytest.raises(ValueError, match="is not reached"):
        latency.search(clock, statistics, selector, 500, CELLS)


def test_photos_of_the_same_tokens_at_all_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="192 tokens each, so that there is nothing to choose"):
        latency._distinct(np.full(6, 192), np.ones(6))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[APTViT], None]:
    """A clock that counts the tokens of a model's first block instead of time, one per millisecond."""
    tokens = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: tokens[0] / 1000)

    def add(module: torch.nn.Module, inputs: tuple) -> None:
        tokens[0] += len(inputs[1].image_N)

    return lambda model: model.blocks[0].register_forward_pre_hook(add)


@pytest.mark.parametrize("target", [("--milliseconds", "40"), ("--images-per-second", "25")], ids=" ".join)
def test_times_are_those_of_the_chosen_patches(
    target: tuple[str, str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Callable
) -> None:
    plain = latency.APTViT

    def counting(**options: object) -> APTViT:
        model = plain(**{**options, "embed_dim": 16, "depth": 1, "num_heads": 2})
        count(model)
        return model

    monkeypatch.setattr(latency, "APTViT", counting)
    found = run(photos, tmp_path / "out", *target, "--square", "64")
    assert mean_share(photos, found["thresholds"], Sizes(square=64)) * 64 == pytest.approx(40, abs=1)


def test_a_config_s_whole_model_is_timed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Callable
) -> None:
    pytest.importorskip("mmseg", reason="--config reads MMSegmentation's configs")
    from apt_dense.hosts.mmseg.training_config import load_config

    from support.tiny_ade import CONFIGS, shrink_options

    real = next(path for path in CONFIGS if path.name.startswith("linear_apt_vit-b16"))
    load_config(str(real), {**shrink_options(real), "model.backbone.patch_size": 8}).dump(tmp_path / "tiny.py")
    plain, logits = latency._segmentor, []

    def counting(config: Path) -> tuple[Callable, APTViT]:
        whole, backbone = plain(config)
        count(backbone)
        return lambda image: logits.append(whole(image)), backbone

    monkeypatch.setattr(latency, "_segmentor", counting)
    config = ("--config", str(tmp_path / "tiny.py"), "--square", "64")
    found = run(photos, tmp_path / "out", "--milliseconds", "40", *config)
    # A class token counts as well.
    assert mean_share(photos, found["thresholds"], Sizes(square=64)) * 64 == pytest.approx(40, abs=1.5)
    assert {tuple(each.shape) for each in logits} == {(1, 150, 64, 64)}


def test_masks_say_what_coarse_patches_hide(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    (tmp_path / "masks").mkdir()
    (photos / "broken.jpg").unlink()
    for path in photos.rglob("*.png"):
        labels = rng.integers(0, 2, (6, 8)).repeat(16, 0).repeat(16, 1) if int(path.stem) % 3 else np.zeros((96, 128))
        cv2.imwrite(str(tmp_path / "masks" / f"{path.stem}_L.png"), labels.astype(np.uint8))
    masks = ("--masks", str(tmp_path / "masks"))
    found = run(photos, tmp_path / "out", "--tokens", "0.6", *masks)
    selector = PatchSelector(patch_size=8, thresholds=tuple(found["thresholds"]))
    coarse = mixed = 0
    for path in sorted(photos.rglob("*.png")):
        labels = cv2.imread(str(tmp_path / "masks" / f"{path.stem}_L.png"), cv2.IMREAD_UNCHANGED)
        scale_map = partition_photo(read_photo(path), selector).scale_map[0]
        for y, x in (scale_map > 0).nonzero().tolist():
            scale = int(scale_map[y, x])
            if y % 2**scale == x % 2**scale == 0:
                part = labels[8 * y : 8 * y + (8 << scale), 8 * x : 8 * x + (8 << scale)]
                coarse, mixed = coarse + 1, mixed + (part.max() > part.min())
    assert found["labels"]["mixed"] == pytest.approx(mixed / coarse, abs=0.02) and mixed
    assert "hold several classes" in capsys.readouterr().out and (tmp_path / "out" / "labels.png").is_file()
    wanted = run(photos, tmp_path / "out", "--mixed", "0.2", *masks)["labels"]["mixed"]
    assert wanted == pytest.approx(0.2, abs=0.03)
    with pytest.raises(SystemExit, match="no border between two classes"):  # with 1 void, all that is left is 0
        run(photos, tmp_path / "void", "--tokens", "0.6", *masks, "--void", "1")
    (tmp_path / "masks" / "03_L.png").unlink()
    with pytest.raises(SystemExit, match=r"holds no 03_L.png .* nor masks for 0 others"):
        run(photos, tmp_path / "out", "--tokens", "0.6", *masks)


def write_files(root: Path, *names: str) -> list[Path]:
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_masks_of_equal_names_are_those_of_the_same_folder(tmp_path: Path) -> None:
    """Not the last of that name, which belongs to another photo."""
    photos = write_files(tmp_path / "photos", "a/0.jpg", "b/0.jpg", "b/1.jpg", "c/2.jpg", "0.jpg", "b/c/0.jpg")
    masks = write_files(tmp_path / "masks", "a/0.png", "b/0.png", "b/1.png", "else/2.png", "0.png", "b/c/0.png")
    assert find_masks(photos, tmp_path / "masks") == dict(zip(photos, masks, strict=True))


@pytest.mark.parametrize(
    ("photos", "masks", "message"),
    [
        (["a/0.jpg"], ["x/0.png", "y/0.png"], "may have the mask .*x/0.png or .*y/0.png"),
        (["a/0.jpg", "b/0.jpg"], ["0.png"], "a/0.jpg and .*b/0.jpg would both have the mask .*0.png"),
        (["a/0.jpg", "b/0.jpg"], ["a/0.png"], "would both have the mask"),
        (["a/0.jpg", "a/0.jpeg"], ["a/0.png"], "would both have the mask"),
        (["a/0.jpg"], ["x/a/0.png", "y/a/0.png"], "may have the mask"),
        (["a/0.jpg", "b/0.jpg"], ["a/0.png", "c/0.png"], "b/0.jpg may have the mask"),
    ],
)
def test_masks_that_cannot_be_told_apart_are_named(
    photos: list[str], masks: list[str], message: str, tmp_path: Path
) -> None:
    write_files(tmp_path / "masks", *masks)
    with pytest.raises(ValueError, match=message):
        find_masks(write_files(tmp_path / "photos", *photos), tmp_path / "masks")


def noisy_coco(root: Path) -> Path:
    """Two pictures with a small and a large box each, the left half flat."""
    rng, entries, found = np.random.default_rng(0), [], []
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in (1, 2):
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        pixels[:, :48] = 90 + number
        cv2.imwrite(str(root / "train2017" / f"{number}.png"), pixels)
        entries.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 96})
        for box in ([2, 2, 20, 20], [60, 4, 16, 24], [10, 5, 70, 50]):
            found.append({"id": len(found) + 1, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0,
                          "area": box[2] * box[3]})  # fmt: skip
    content = {"images": entries, "annotations": found, "categories": [{"id": 1, "name": "box"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def test_objects_say_what_coarse_patches_hide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flat halves are coarse at any threshold, and hold one of the two small boxes of each picture."""
    pytest.importorskip("pycocotools", reason="reads COCO's layout")
    data, out = noisy_coco(tmp_path / "coco"), tmp_path / "out"
    options = ["--patch-size", "8", "--thresholds", "3", "--workers", "0"]
    calibrate.main(["--coco", str(data), "--out", str(out), "--tokens", "0.625", *options])
    content = json.loads((out / "thresholds.json").read_text())
    assert content["labels"]["small_objects"] == 0.5 and content["images"] == 2
    assert "50.0% of the small objects lie under coarse patches" in capsys.readouterr().out
    # Of 4 x 3 coarse patches of 16 pixels in each flat half: those that boxes begin or end in.
    labels = np.zeros((64, 96), int)
    labels[5:55, 10:80], labels[2:22, 2:22] = 1, 2
    blocks = labels[:, :48].reshape(4, 16, 3, 16).swapaxes(1, 2).reshape(12, -1)
    assert content["labels"]["mixed"] == pytest.approx(np.mean([len(set(block)) > 1 for block in blocks.tolist()]))
    with pytest.raises(SystemExit):
        calibrate.main(["--coco", str(data), str(tmp_path), "--out", str(out), "--tokens", "0.6"])


@pytest.mark.parametrize("size", [(64, 96), (50, 96), (96, 50)], ids=str)
def test_boxes_are_moved_as_pictures_are(size: tuple[int, int]) -> None:
    """Where a marked rectangle ends up."""
    picture = np.zeros((*size, 3), np.uint8)
    picture[20:40, 24:44] = 255
    for sizes in (Sizes(), Sizes(longer=192), Sizes(square=100), Sizes(within=(64, 64))):
        made = sizes.apply(picture)
        ((left, top, right, bottom),) = sizes.apply_to_boxes(np.array([[24, 20, 44, 40.0]]), size, made.shape[:2])
        rows, columns = np.where(made[..., 0] > 127)
        left, top = max(left, 0), max(top, 0)  # the square of a tall picture begins below the rectangle's top
        assert [columns.min(), rows.min()] == pytest.approx([left, top], abs=1.5)
        assert [columns.max() + 1, rows.max() + 1] == pytest.approx([right, bottom], abs=1.5)
    assert not len(Sizes(square=10).apply_to_boxes(np.array([[0, 0, 1, 1.0]]), (20, 60), (10, 10)))


@pytest.mark.parametrize("as_stored", [True, False], ids=["as stored", "as shown"])
def test_objects_lie_where_their_annotations_say_in_turned_photos(tmp_path: Path, as_stored: bool) -> None:
    """EXIF turns photos; annotations may be of either."""
    pytest.importorskip("pycocotools", reason="reads COCO's layout")
    data = noisy_coco(tmp_path / "coco")
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for entry in content["images"]:
        entry["file_name"] = entry["file_name"].replace(".png", ".jpg")
        pixels = cv2.imread(str(data / "train2017" / entry["file_name"].replace(".jpg", ".png")))[..., ::-1]
        stored = pixels if as_stored else np.rot90(pixels)  # which orientation 6 turns back
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(stored).save(data / "train2017" / entry["file_name"], exif=exif, quality=100)
    path.write_text(json.dumps(content))
    objects = read_objects_of(data, None)
    for photo in objects.ids:
        picture, labels = objects.photo(photo), objects.labels(photo)
        assert picture.shape[:2] == labels.map.shape == (64, 96)
        assert np.ptp(picture[8:56, 8:40]) < 20 < np.ptp(picture[8:56, 56:88])  # flat on the left
        assert labels.map[10, 10] != labels.map[30, 30] and len(labels.small) == 2


@pytest.mark.parametrize("threshold", [5.8321, 0.018, 0.00123, 4e-5])
def test_thresholds_are_written_with_digits_that_count(threshold: float) -> None:
    assert float(short(threshold)) == pytest.approx(threshold, rel=5e-4) and len(short(threshold)) <= 7
