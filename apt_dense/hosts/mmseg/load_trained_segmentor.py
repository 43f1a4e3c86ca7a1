"""Load what tools/train_seg.py, or any run of MMEngine, wrote, ready to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from torch import nn

import apt_dense.hosts.mmseg  # noqa: F401 (registers what configs name)
from apt_dense.hosts.mmseg.dataset_checks import dataset_configs, one_line
from apt_dense.hosts.mmseg.read_dumped_config import read_dumped_config
from apt_dense.hosts.mmseg.safe_checkpoints import check_weights, load_from_safe
from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.hosts.mmseg.trusted_config_types import trusted_model, trusted_steps
from apt_dense.hosts.trained_model_types import TrainedSegmentor

MARKER = "last_checkpoint"  # MMEngine's note of the last checkpoint in a run's folder


class MMSegSegmentor(TrainedSegmentor):
    """A segmentor of MMSegmentation, which sees photos as its test pipeline prepares them.

    Args:
        steps: of the test pipeline, after the reading of the picture.
        **options: as for :class:`TrainedSegmentor`.
    """

    def __init__(self, steps: Sequence[Any], **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    def _segment(self, photo: np.ndarray) -> np.ndarray:
        size = photo.shape[:2]
        results = {"img": np.ascontiguousarray(photo[..., ::-1]), "img_shape": size, "ori_shape": size}
        for step in self.steps:
            results = step(results)
        batch = {"inputs": [results["inputs"]], "data_samples": [results["data_samples"]]}
        return self.model.test_step(batch)[0].pred_sem_seg.data[0].long().cpu().numpy()


def load_trained_segmentor(path: Path, config: str | None = None) -> MMSegSegmentor:
    """Load a checkpoint, or the last one of a run's folder, on the CPU.

    The model is built from the config inside the checkpoint, of which nothing is run (``dumped_config``), or else from
    ``config``, a config file that is run as MMEngine runs it.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged, does not fit its config, or its config holds
            code or other types than those of MMSegmentation and of packages that are imported already.
    """
    path = last_checkpoint(path) if path.is_dir() else path
    checkpoint = load_from_safe(str(path))
    meta = _mapping(checkpoint.get("meta"))
    cfg, source = _config(meta, path, config)
    model = _build(trusted_model(cfg.get("model"), source), source)
    check_weights(model, checkpoint, str(path))
    state = checkpoint.get("state_dict", checkpoint)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    return MMSegSegmentor(
        trusted_steps(_pipeline(cfg), source), model=model, backbone=model.backbone, **_classes(meta, model)
    )


def last_checkpoint(folder: Path) -> Path:
    """Find the last checkpoint of a run in its folder, which may have been moved. Raises FileNotFoundError."""
    marker = folder / MARKER
    named = [folder / Path(marker.read_text(encoding="utf-8").strip()).name] if marker.is_file() else []
    newest_first = sorted(folder.glob("*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = next((path for path in [*named, *newest_first] if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint (*.pth) of a run; name the file")
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _config(meta: Mapping[str, Any], path: Path, config: str | None) -> tuple[Mapping[str, Any], str]:
    """Return the config of a run, and how errors name it."""
    if config is not None:
        return load_config(config), config
    text = meta.get("cfg")
    if not isinstance(text, str):
        raise ValueError(
            f"{path} holds weights without the config of their run; name the config that they were trained with: "
            f"config=FILE (--config)"
        )
    source = f"the config in {path}"
    return ConfigDict(read_dumped_config(text, source)), source


def _build(config: Mapping[str, Any], source: str) -> nn.Module:
    try:
        with DefaultScope.overwrite_default_scope("mmseg"):
            return revert_sync_batchnorm(MODELS.build(ConfigDict(config)))
    except Exception as error:  # of whatever type the config names
        raise ValueError(f"{source}: its model cannot be built: {one_line(error)}") from error


def _pipeline(cfg: Mapping[str, Any]) -> Sequence[Any]:
    """Return the steps by which pictures are prepared for a test."""
    for key in ("test_dataloader", "val_dataloader"):
        for dataset in dataset_configs(cfg.get(key)):
            return dataset.get("pipeline") or ()
    return cfg.get("test_pipeline") or ({"type": "PackSegInputs"},)


def _classes(meta: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return names and colours of the classes, and the label of the first of them in masks."""
    known = _mapping(meta.get("dataset_meta"))
    head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
    count = max(2, head.num_classes)
    names = [f"class {number}" for number in range(count)]
    colours = np.random.default_rng(0).integers(40, 256, (count, 3)).tolist()
    if len(known.get("classes") or ()) == count:
        names = known["classes"]
    if np.shape(known.get("palette") or ()) == (count, 3):
        colours = known["palette"]
    return {"class_names": names, "palette": colours, "first_label": int(bool(known.get("reduce_zero_label")))}
