"""calibrate --pipeline: tokens after each transform, recounted plainly; seeds; transforms that return None; errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmseg", reason="reads the configs of MMSegmentation")

import calibrate
from mmcv.transforms import BaseTransform
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS
from visualize import partition_photo

from apt_dense import PatchSelector
from apt_dense.hosts.randomness_from_seeds import random_numbers

from calibration import tokens_after_each_transform as module
from support.tiny_ade import write_ade
from support.tiny_segmentors import PREPROCESSOR, mmseg_scope  # noqa: F401 (a fixture)

STEPS = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(96, 64), ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(56, 56)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
PATCHES = {"patch_size": 8, "thresholds": (5.6,), "drop_padding": True}
SHOWN = ["LoadImageFromFile", "RandomResize", "RandomCrop", "RandomFlip", "PhotoMetricDistortion"]


@TRANSFORMS.register_module()
class SometimesNone(BaseTransform):
    """Returns None in a share of the draws."""

    def __init__(self, share: float) -> None:
        self.share = share

    def transform(self, results: dict) -> dict | None:
        return None if np.random.random() < self.share else results


@TRANSFORMS.register_module()
class FlattenInPlace(BaseTransform):
    """Makes an image grey without a new array."""

    def transform(self, results: dict) -> dict:
        results["img"][:] = 90
        return results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade(tmp_path_factory.mktemp("data") / "ade", images=4)


def write_config(folder: Path, data: Path, steps: list[dict] | None = None, **backbone: object) -> Path:
    data_set = {"type": "ADE20KDataset", "data_root": str(data), "pipeline": STEPS if steps is None else steps}
    data_set["data_prefix"] = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    model = {"data_preprocessor": {**PREPROCESSOR, "size_divisor": None, "size": (64, 64)}}
    model["backbone"] = {"type": "APTViT", "img_size": 64, "pixel_mean": PREPROCESSOR["mean"], **PATCHES, **backbone}
    path = folder / "config.py"
    text = f"model = {model}\ntrain_dataloader = dict(dataset={data_set})\n"
    path.write_text(f"custom_imports = dict(imports=['apt_dense.hosts.mmseg'])\ndefault_scope = 'mmseg'\n{text}")
    return path


def run(config: Path, *more: str) -> dict[str, list[str]]:
    """Run the tool and return the table's cells by step."""
    out = config.parent / "out"
    calibrate.main(["--pipeline", str(config), "--out", str(out), "--workers", "0", *more])
    assert cv2.imread(str(out / "pipeline.png")).shape[0] > 150
    lines = [line for line in (out / "pipeline.md").read_text().splitlines() if line.startswith("| ")][2:]
    return {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}


def recount(
    data: Path, steps: list[dict], number: int, draw: int, thresholds: tuple[float, ...] = PATCHES["thresholds"]
) -> float | None:
    """The share of tokens after some steps, drawn from the start; None where there is no image."""
    info = {"img_path": str(data / f"images/training/{number}.jpg"), "seg_fields": [], "reduce_zero_label": True,
            "label_map": None, "seg_map_path": str(data / f"annotations/training/{number}.png")}  # fmt: skip
    selector = PatchSelector(**{**PATCHES, "thresholds": thresholds})
    with random_numbers(0, number, draw, 0):
        made = Compose(steps)(info)
    if "img" in made:
        return partition_photo(made["img"][..., ::-1], selector).tokens_kept
    prepare = MODELS.build({**PREPROCESSOR, "size_divisor": None, "size": (64, 64)})
    batch = {"inputs": [made["inputs"]], "data_samples": [made["data_samples"]]}
    return float(selector.tokens_kept(prepare(batch, training=True)["inputs"]))


def test_every_step_is_recounted_plainly(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(write_config(tmp_path, data), "--draws", "3")
    said = capsys.readouterr().out
    assert list(found) == [*SHOWN, "padding by SegDataPreProcessor"] and "| RandomCrop |" in said
    assert "12 draws of 4 photos" in said and "Changed no image: LoadAnnotations, PackSegInputs." in said
    for step, name in [(1, SHOWN[0]), *((i, STEPS[i - 1]["type"]) for i in (3, 4, 5, 6)), (7, [*found][-1])]:
        shares = sorted(recount(data, STEPS[:step], number, draw) for number in range(4) for draw in range(3))
        mean, low, middle, high = (float(found[name][place].strip("%")) / 100 for place in (2, 4, 5, 6))
        assert mean == pytest.approx(np.mean(shares), abs=6e-4), name
        assert [low, middle, high] == pytest.approx([shares[0], shares[5], shares[11]], abs=6e-4), name
    sizes = {name: cells[0] for name, cells in found.items()}
    assert sizes["LoadImageFromFile"] == "64 x 96" and sizes["padding by SegDataPreProcessor"] == "64 x 64"


def test_seeds_alone_decide_the_draws(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    np.random.seed(1)
    first = run(config, "--draws", "2")
    np.random.seed(2)
    assert run(config, "--draws", "2", "--workers", "2") == first
    assert run(config, "--draws", "2", "--seed", "1") != first


def test_changes_in_place_are_seen_and_no_padding_is_not_shown(data: Path, tmp_path: Path) -> None:
    steps = [*STEPS[:2], dict(type="Resize", scale=(64, 64)), dict(type="FlattenInPlace"), STEPS[-1]]
    found = run(write_config(tmp_path, data, steps), "--draws", "1")
    assert list(found) == ["LoadImageFromFile", "Resize", "FlattenInPlace"]
    assert found["FlattenInPlace"][:3] == ["64 x 64", "16", "25.0%"] and float(found["Resize"][2].strip("%")) > 50
    text = (tmp_path / "out" / "pipeline.md").read_text()
    assert "Changed no image: LoadAnnotations, PackSegInputs, padding by SegDataPreProcessor." in text


def test_photos_without_masks(data: Path, tmp_path: Path) -> None:
    """A crop by classes then takes any place."""
    steps = [*STEPS[:3], {**STEPS[3], "cat_max_ratio": 0.75}, *STEPS[4:]]
    steps.insert(2, dict(type="CheckLabels", num_classes=150))
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        photo = photos / f"{number}.jpg"
        photo.write_bytes((data / f"images/training/{number}.jpg").read_bytes())
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    config = write_config(tmp_path, tmp_path / "nowhere", steps)
    found = run(config, str(photos), "--draws", "2")
    assert list(found)[:5] == SHOWN
    text = (tmp_path / "out" / "pipeline.md").read_text()
    assert "6 draws of 3 photos" in text and "saw one class everywhere" in text


def test_a_step_that_returns_none_is_drawn_again_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [*STEPS[:3], dict(type="SometimesNone", share=0.5), *STEPS[3:]]
    found = run(write_config(tmp_path, data, steps), "--draws", "4")
    text = (tmp_path / "out" / "pipeline.md").read_text()
    assert "16 draws of 4 photos" in text and list(found)[:5] == SHOWN
    none = 0
    for number in range(4):
        for draw in range(4):
            for attempt in range(module.TRIES):
                with random_numbers(0, number, draw, attempt):
                    made = Compose(steps[:3])({
                        "img_path": str(data / f"images/training/{number}.jpg"), "seg_fields": [], "label_map": None,
                        "reduce_zero_label": True, "seg_map_path": str(data / f"annotations/training/{number}.png"),
                    }) and np.random.random()  # fmt: skip
                if made >= 0.5:
                    break
                none += 1
    assert none > 3 and f"SometimesNone returned None {none} times" in text
    steps[3]["share"] = 1.0
    with pytest.raises(SystemExit, match=r"none of 4 photos .*0.jpg: SometimesNone returned None in 20 draws"):
        run(write_config(tmp_path, data, steps))


@pytest.mark.parametrize(
    ("steps", "backbone", "said"),
    [
        ([], {}, "no train_dataloader whose data set has a pipeline"),
        (None, {"thresholds": ()}, "its backbone has no thresholds"),
        (None, {"token_budget": 0.6}, "with token_budget=0.6 every image keeps as many tokens"),
        (STEPS[:-1], {}, "should end with PackSegInputs"),
        ([*STEPS[:2], dict(type="RandomCrop", crop_size=0)], {}, "cannot be built"),
        ([STEPS[0], dict(type="SometimesNone", share="x")], {}, "SometimesNone, a step of the pipeline, fails for"),
    ],
)
def test_configs_without_a_usable_pipeline(
    data: Path, tmp_path: Path, steps: list[dict] | None, backbone: dict, said: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(said)):
        run(write_config(tmp_path, data, steps, **backbone))
    assert not (tmp_path / "out" / "pipeline.md").exists()


@pytest.mark.parametrize("more", [["--mixed", "0.6"], ["--milliseconds", "9"], ["--masks", "m"], ["--square", "64"]])
def test_options_that_do_not_go_with_it(data: Path, tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(write_config(tmp_path, data), *more)
    assert stopped.value.code == 2


def test_a_target_is_met_by_what_training_sees(data: Path, tmp_path: Path) -> None:
    """Counted of each draw, with the thresholds that were found."""
    config, out = write_config(tmp_path, data), tmp_path / "out"
    options = ["--out", str(out), "--workers", "0", "--draws", "3", "--tokens", "0.6", "--thresholds", "6.5"]
    calibrate.main(["--pipeline", str(config), *options])
    content = json.loads((out / "thresholds.json").read_text())
    shares = [recount(data, STEPS, number, draw, content["thresholds"]) for number in range(4) for draw in range(3)]
    assert content["images"] == 12 and content["share"] == pytest.approx(0.6, abs=1e-3)
    assert np.mean(shares) == pytest.approx(0.6, abs=0.02)
    margin = 1.96 * content["deviation"] * (2 / 4) ** 0.5  # of four photos, not of twelve draws
    assert content["expected"] == pytest.approx([max(0.6 - margin, 0), min(0.6 + margin, 1)], abs=2e-3)
    assert cv2.imread(str(out / "worst.png")) is not None and not (out / "pipeline.md").exists()
    with pytest.raises(SystemExit, match="made with other settings"):
        calibrate.main(["--pipeline", str(config), *options, "--seed", "1"])


def test_the_same_command_continues_and_another_pipeline_does_not(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With photos given, for which labels are made up."""
    config, photos = write_config(tmp_path, data), data / "images" / "training"
    argv = ["--pipeline", str(config), str(photos), "--out", str(tmp_path / "out"), "--workers", "0", "--draws", "2"]
    argv += ["--tokens", "0.5", "--thresholds", "6.5"]
    calibrate.main(argv)
    record = tmp_path / "out" / "curves.jsonl"
    whole = record.read_text()
    assert "8 draws" in capsys.readouterr().out
    record.write_text("".join(whole.splitlines(keepends=True)[:4]))
    calibrate.main(argv)
    assert record.read_text() == whole
    steps = [dict(step, cat_max_ratio=0.5) if step["type"] == "RandomCrop" else step for step in STEPS]
    write_config(tmp_path, data, steps)
    with pytest.raises(SystemExit, match="made with other settings"):
        calibrate.main(argv)


def test_a_step_that_fails_ends_a_calibration(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data, [STEPS[0], dict(type="SometimesNone", share="x")])
    argv = ["--pipeline", str(config), "--out", str(tmp_path / "out"), "--workers", "0", "--tokens", "0.6"]
    with pytest.raises(SystemExit, match="SometimesNone, a step of the pipeline, fails for"):
        calibrate.main(argv)
    assert not (tmp_path / "out" / "thresholds.json").exists()


@pytest.mark.parametrize("more", [["--draws", "2"], ["--void", "3"], ["--model", "base"]], ids=str)
def test_options_without_effect_are_refused(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        calibrate.main([str(tmp_path), "--out", str(tmp_path / "out"), "--tokens", "0.6", *more])
    assert stopped.value.code == 2
