"""Runs of MMSegmentation, loaded again: the same labels as in a test, from a folder or a file, and nothing run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.config import Config
from mmseg.apis import inference_model
from mmseg.registry import MODELS

from apt_dense.hosts.mmseg.load_trained_segmentor import load_trained_segmentor
from apt_dense.hosts.mmseg.trusted_config_types import trusted_model

from support.references import randomise
from support.tiny_segmentors import CLASSES, PREPROCESSOR, SEGMENTORS, SMALL, TEST_MODES, mmseg_scope  # noqa: F401

PHOTO = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
PHOTO[:, :30] = 90
META = {"classes": ("road", "sky", "tree"), "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "reduce_zero_label": True}
PIPELINE = [
    {"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (256, 64), "keep_ratio": True},
    {"type": "LoadAnnotations", "reduce_zero_label": True}, {"type": "CheckLabels", "num_classes": CLASSES},
    {"type": "PackSegInputs"},
]  # fmt: skip


def tiny_config(kind: str = "fcn", mode: str = "whole") -> Config:
    """The config of a run, as MMEngine keeps it."""
    model = copy.deepcopy(SEGMENTORS[kind])
    model["backbone"] = {"type": "APTViT", **SMALL, "thresholds": (4.0,), "pretrained": "none.pth", **model["backbone"]}
    model["decode_head"]["norm_cfg"] = {"type": "SyncBN"}
    model |= {"type": "EncoderDecoder", "data_preprocessor": PREPROCESSOR, "test_cfg": TEST_MODES[mode]}
    dataset = {"type": "BaseSegDataset", "pipeline": PIPELINE}
    imports = {"imports": ["apt_dense.hosts.mmseg"], "allow_failed_imports": False}
    return Config({"custom_imports": imports, "model": model, "val_dataloader": {"dataset": dataset}})


def built(cfg: Config) -> torch.nn.Module:
    model = copy.deepcopy(cfg.model)
    model.backbone.pretrained = None
    model.decode_head.norm_cfg = {"type": "BN"}
    return randomise(MODELS.build(model), 0.5).eval()


def write_run(folder: Path, change: Callable[[dict], object] | None = None, **config: str) -> torch.nn.Module:
    """Write the folder of a run of random weights; return its model."""
    cfg = tiny_config(**config)
    model = built(cfg)
    if change:
        change(cfg._cfg_dict)
    folder.mkdir(exist_ok=True)
    meta = {"cfg": cfg.pretty_text, "dataset_meta": META, "iter": 7}
    torch.save({"meta": meta, "state_dict": model.state_dict(), "message_hub": {}}, folder / "iter_7.pth")
    (folder / "last_checkpoint").write_text("/elsewhere/before/it/was/moved/iter_7.pth")
    model.cfg = Config({"test_pipeline": [step for step in copy.deepcopy(PIPELINE) if step["type"] != "CheckLabels"]})
    return model


@pytest.mark.parametrize(("kind", "mode"), [("fcn", "whole"), ("upernet", "slide")])
def test_a_photo_gets_the_labels_that_mmseg_gives_it(kind: str, mode: str, tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", kind=kind, mode=mode)
    expected = inference_model(model, PHOTO[..., ::-1]).pred_sem_seg.data[0]
    assert len(expected.unique()) > 1
    for path in (tmp_path / "run", tmp_path / "run" / "iter_7.pth"):
        trained = load_trained_segmentor(path)
        found = trained.predict(PHOTO)
        assert found.shape == PHOTO.shape[:2] and np.array_equal(found, expected)
        assert trained.class_names == META["classes"] and trained.palette[2] == (7, 8, 9) and trained.first_label == 1
        assert trained.backbone is trained.model.backbone and not trained.model.training


def test_a_folder_without_its_marker(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "last_checkpoint").write_text("http://127.0.0.1:9/iter_9.pth")  # would be downloaded, if it were asked
    assert load_trained_segmentor(tmp_path).class_names == META["classes"]
    (tmp_path / "iter_7.pth").unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_trained_segmentor(tmp_path)


def test_weights_without_a_config_need_one(tmp_path: Path) -> None:
    write_run(tmp_path)
    expected = load_trained_segmentor(tmp_path).predict(PHOTO)
    tiny_config().dump(tmp_path / "own.py")
    state = torch.load(tmp_path / "iter_7.pth", weights_only=True)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="name the config"):
        load_trained_segmentor(tmp_path / "model.pth")
    trained = load_trained_segmentor(tmp_path / "model.pth", str(tmp_path / "own.py"))
    assert np.array_equal(trained.predict(PHOTO), expected)
    assert trained.class_names == ("class 0", "class 1", "class 2") and trained.first_label == 0


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    write_run(tmp_path, lambda cfg: cfg["model"]["backbone"].update(depth=1))
    with pytest.raises(ValueError, match="does not fit this config's model"):
        load_trained_segmentor(tmp_path)


# ---- configs from strangers


def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('ran')\n")
    return "evil"


def of_type(kind: str, **options: object) -> Callable[[dict], object]:
    return lambda cfg: cfg["model"]["decode_head"].update(norm_cfg={"type": kind, **options})


CHANGES = {
    "a call": (of_type("os.mkdir", name="ran"), "names the type 'os.mkdir'"),
    "a module": (of_type("evil"), "names the type 'evil', which is not registered"),
    "an attribute": (of_type("evil.Anything"), "'evil.Anything', which is not registered"),
    "another model": (lambda cfg: cfg["model"].update(type="os.mkdir"), "names the type 'os.mkdir'"),
    "another backbone": (lambda cfg: cfg["model"].update(backbone={"type": "ResNet", "depth": 50}), "ResNet"),
    "files in arguments": (
        lambda cfg: cfg["model"].update(neck={"type": "TIMMBackbone", "model_name": "x", "checkpoint_path": "y"}),
        "TIMMBackbone.*not built from a run's config",
    ),
    "a scope": (lambda cfg: cfg["model"].update(_scope_="evil"), "the key '_scope_'"),
    "a step": (
        lambda cfg: cfg["val_dataloader"]["dataset"].update(pipeline=[{"type": "Albu", "transforms": []}]), "Albu"
    ),
    "a step that pads": (
        lambda cfg: cfg["val_dataloader"]["dataset"].update(pipeline=[{"type": "Pad", "size_divisor": 32}]),
        "has Pad, which photos cannot be put through",
    ),
    "a step that crops": (
        lambda cfg: cfg["val_dataloader"]["dataset"].update(pipeline=[{"type": "CenterCrop", "crop_size": 32}]),
        "has CenterCrop, which photos cannot be put through",
    ),
    "a step of a module": (
        lambda cfg: cfg["val_dataloader"]["dataset"].update(pipeline=[{"type": "evil.Resize2"}]), "Resize2"
    ),
    "wrong types": (lambda cfg: cfg.update(model=3), "no model with a backbone"),
    "wrong arguments": (lambda cfg: cfg["model"]["decode_head"].update(colour=3), "cannot be built"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_config_of_a_stranger_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil(tmp_path, monkeypatch)
    change, message = CHANGES[name]
    write_run(tmp_path / "run", change)
    with pytest.raises(ValueError, match=message):
        load_trained_segmentor(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_imports_and_further_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a config, neither the imports nor what names other files is used."""
    evil(tmp_path, monkeypatch)

    def change(cfg: dict) -> None:
        cfg["custom_imports"]["imports"].append("evil")
        cfg["model"]["decode_head"]["loss_decode"]["class_weight"] = "evil.pkl"
        cfg["model"]["init_cfg"] = {"type": "Pretrained", "checkpoint": "evil.pth"}

    write_run(tmp_path / "run", change)
    assert load_trained_segmentor(tmp_path / "run").predict(PHOTO).shape == (50, 70)
    assert not (tmp_path / "ran").exists()


def test_the_config_text_is_not_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    content = torch.load(tmp_path / "iter_7.pth", weights_only=True)
    content["meta"]["cfg"] += f"\nx = __import__('os').mkdir({str(tmp_path / 'ran')!r})\n"
    torch.save(content, tmp_path / "iter_7.pth")
    with pytest.raises(ValueError, match="is code, which is not run"):
        load_trained_segmentor(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_types_of_packages_that_are_imported_are_built(tmp_path: Path) -> None:
    @MODELS.register_module(name="HeadOfAUser", force=True)
    class HeadOfAUser(MODELS.get("FCNHead")):
        pass

    write_run(tmp_path, lambda cfg: cfg["model"]["decode_head"].update(type="HeadOfAUser"))
    assert type(load_trained_segmentor(tmp_path).model.decode_head) is HeadOfAUser


def test_names_with_their_module_are_those_that_are_registered() -> None:
    """As configs of MMEngine's lazy style are dumped."""
    config = {"type": "mmseg.models.segmentors.EncoderDecoder", "backbone": {"type": "evil.APTViT"}}
    assert trusted_model(config, "x") == {"type": "EncoderDecoder", "backbone": {"type": "APTViT"}}
