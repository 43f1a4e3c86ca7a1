"""tools/measure_accuracy.py labels: a trained segmentor, switched, against MMSegmentation's own evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.references import randomise
from support.tiny_ade import ROOT, one_thread  # noqa: F401

pytest.importorskip("mmseg", reason="segmentors need the packages of the extra 'mmseg'")

import eval_seg
import measure_accuracy as tool
from mmengine.registry import MODELS, init_default_scope

from apt_dense.hosts.mmseg.training_config import load_config

from evidence import miou_without_training as segmentation
from evidence.model_forms import Form

CONFIG = ROOT / "configs" / "mmseg" / "linear_uniform_dinov2-s14_2k_camvid-364x476.py"
HEIGHT, WIDTH = 56, 84
TINY = {
    "model.backbone.embed_dim": 16,
    "model.backbone.depth": 2,
    "model.backbone.num_heads": 2,
    "model.backbone.out_indices": (1,),
    "model.backbone.img_size": (HEIGHT, WIDTH),
    "model.decode_head.in_channels": 16,
    "model.decode_head.channels": 16,
    "test_dataloader.num_workers": 0,
    "test_dataloader.persistent_workers": False,
    "test_dataloader.dataset.pipeline.1.scale": (WIDTH, HEIGHT),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a checkpoint of random weights, images and masks."""
    root = tmp_path_factory.mktemp("labels")
    for kind in ("images", "annotations"):
        (root / kind / "testing").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        strength = np.linspace(2, 100, WIDTH)[:, None]
        pixels = 120 + strength * rng.uniform(-1, 1, (HEIGHT, WIDTH, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / "testing" / f"{i}.png")
        mask = rng.integers(0, 12, (HEIGHT, WIDTH), dtype=np.uint8)
        Image.fromarray(mask).save(root / "annotations" / "testing" / f"{i}.png")
    cfg = load_config(str(CONFIG), TINY)
    cfg.dump(root / "config.py")
    init_default_scope("mmseg")
    torch.save({"state_dict": randomise(MODELS.build(cfg.model), 0.5).state_dict()}, root / "model.pth")
    return root


def options(folder: Path, out: Path) -> list[str]:
    return [
        "labels", "--config", str(folder / "config.py"), "--checkpoint", str(folder / "model.pth"),
        "--images", str(folder / "images" / "testing"), "--masks", str(folder / "annotations" / "testing"),
        "--sizes", f"{HEIGHT}x{WIDTH}", "--shares", "0.8", "--out", str(out),
    ]  # fmt: skip


def results(out: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    return {row["settings"]["variant"]: row["results"] for row in lines}


@pytest.mark.filterwarnings("ignore")
def test_the_scores_are_those_of_the_host(folder: Path, tmp_path: Path) -> None:
    form = "half: proportional_attention=0.5"
    scales = "two scales: thresholds=(5.0, 4.0)"
    tool.main([*options(folder, tmp_path / "out"), "--form", "plain", "--form", form, "--form", scales])
    found = results(tmp_path / "out")
    assert list(found) == ["uniform", "smaller image", "plain", "half", "two scales"]
    first, second = found["two scales"]["thresholds"]
    assert first / second == pytest.approx(5 / 4), "a form's own thresholds are scaled"
    for variant, power in (("uniform", 0.0), ("plain", 0.0), ("half", 0.5)):
        backbone = [f"model.backbone.thresholds={tuple(found[variant]['thresholds'])!r}".replace(" ", "")]
        backbone += [f"model.backbone.proportional_attention={power}"]
        metrics = eval_seg.main([
            str(folder / "config.py"), str(folder / "model.pth"), "--data-root", str(folder),
            "--work-dir", str(tmp_path / variant), "--cfg-options", *backbone,
        ])  # fmt: skip
        # The host rounds to two places.
        assert found[variant]["mIoU"] == pytest.approx(metrics["mIoU"], abs=0.006), variant
        assert found[variant]["accuracy"] == pytest.approx(metrics["aAcc"], abs=0.006), variant
    assert len({row["mIoU"] for row in found.values()}) == 4
    assert found["smaller image"]["tokens"] == pytest.approx(20 / 24) and 0.7 < found["half"]["tokens"] <= 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--masks", "nowhere"], "2 images, 2 without a mask in nowhere"),
        (["--images", "a", "b"], "2 folders of images and 1 of masks"),
        (["--config", "nowhere.py"], "no config file nowhere.py"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said_in_a_line(
    changes: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([*options(folder, tmp_path / "out"), *changes])
    assert message in str(ended.value.code) and "\n" not in str(ended.value.code)


def test_other_backbones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text('model = dict(type="EncoderDecoder", backbone=dict(type="ResNet"))\n')
    with pytest.raises(ValueError, match="its backbone is ResNet"):
        segmentation.load_segmentor(tmp_path / "other.py", tmp_path / "x.pth", Form("a", {}), (5.5,))
