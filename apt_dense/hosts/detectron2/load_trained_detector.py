"""Load what tools/train_det.py, or Detectron2's DefaultTrainer, wrote, ready to use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch import nn

from apt_dense.hosts.detectron2.class_names_of_run import read_classes
from apt_dense.hosts.detectron2.read_lazy_config import load_config
from apt_dense.hosts.detectron2.read_run_config import build, find_all, read_run_config, resolved
from apt_dense.hosts.detectron2.safe_checkpoints import APTCheckpointer
from apt_dense.hosts.detectron2.yacs import add_apt_config
from apt_dense.hosts.trained_model_types import NO_SIZE, Detections, TrainedDetector, check_factor
from apt_dense.vit import APTViT

CONFIG = "config.yaml"  # Detectron2's name of a run's config
MARKER = "last_checkpoint"  # and of the note of its last checkpoint
_SQUARE = "_square_pad"  # of Detectron2's SimpleFeaturePyramid: pixels of the square that it asks for


class Detectron2Detector(TrainedDetector):
    """A detector of Detectron2, which sees photos resized as in its tests.

    Args:
        resize: for photos; None leaves them as they are.
        input_format: "RGB" or "BGR".
        **options: as for :class:`TrainedDetector`.

    Raises:
        ValueError: for another format.
    """

    def __init__(self, resize: ResizeShortestEdge | None, input_format: str, **options: Any) -> None:
        super().__init__(**options)
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"the run read pictures as {input_format!r}; photos can be given as RGB or BGR")
        self.resize, self.input_format, self._resize_of_tests = resize, input_format, resize
        self._square = getattr(getattr(self.model, "backbone", None), _SQUARE, 0)

    def scale_photos(self, factor: float) -> None:
        """Resize photos, and the square that they are padded to if there is one; see :class:`TrainedDetector`."""
        check_factor(factor)
        given = self._resize_of_tests
        if given is None or not all(given.short_edge_length):
            raise ValueError(NO_SIZE)
        lengths = [max(1, round(factor * length)) for length in given.short_edge_length]
        self.resize = ResizeShortestEdge(lengths, max(1, round(factor * given.max_size)), given.sample_style)
        if self._square:
            step = self.model.backbone.size_divisibility or self.backbone.patch_size
            setattr(self.model.backbone, _SQUARE, step * math.ceil(factor * self._square / step))

    def _detect(self, photo: np.ndarray) -> Detections:
        pixels = photo if self.input_format == "RGB" else photo[..., ::-1]
        if self.resize is not None:
            pixels = self.resize.get_transform(pixels).apply_image(pixels)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
        height, width = photo.shape[:2]
        found = self.model([{"image": image.to(self.device), "height": height, "width": width}])[0]["instances"]
        boxes, scores, labels = (
            part.cpu().numpy() for part in (found.pred_boxes.tensor.float(), found.scores.float(), found.pred_classes)
        )
        masks = found.pred_masks.cpu().numpy().astype(bool) if found.has("pred_masks") else None
        return Detections(boxes, scores, labels, masks)


def load_trained_detector(path: Path, config: str | None = None) -> Detectron2Detector:
    """Load a checkpoint, or the last one of a run's folder, on the CPU.

    The model is built from the config.yaml next to the checkpoint, of which nothing is run (``run_config``), or else
    from ``config``, a lazy config that is run as Detectron2 runs it.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged, does not fit its config, or its config asks
            for other classes than those of Detectron2's models.
    """
    path = last_checkpoint(path) if path.is_dir() else path
    if config is not None:
        parts = _of_lazy_config(config)
    else:
        content = _with_weights_of_run(read_run_config(path.parent / CONFIG), path)
        read = _of_run if "model" in content else _of_yacs
        parts = read(content, path.parent / CONFIG)
    model, names = parts.pop("model"), parts.pop("names")
    APTCheckpointer(model, complete=True).load(str(path))
    ids, class_names = zip(*read_classes(path.parent, names, _num_classes(model)), strict=True)
    return Detectron2Detector(
        **parts, model=model, backbone=_backbone(model, path), class_names=class_names, category_ids=ids
    )


def last_checkpoint(folder: Path) -> Path:
    """Find the last checkpoint of a run in its folder, which may have been moved. Raises FileNotFoundError."""
    marker = folder / MARKER
    named = [folder / Path(marker.read_text(encoding="utf-8").strip()).name] if marker.is_file() else []
    found = next((path for path in [*named, folder / "model_final.pth"] if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no {MARKER} and no model_final.pth; name the checkpoint")
    return found


def _of_run(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return model, input and data sets of a lazy config as a run dumped it."""
    config = resolved(content, path)
    return {"model": build(config["model"], path), **_input(config.get("dataloader"), config["model"])}


def _with_weights_of_run(content: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Let a run's checkpoint tell the architecture, where its yacs config names the file that training started from:
    that one may be gone, and only files of the run are read."""
    part: Any = content
    for key in ("MODEL", "APT", "PRETRAINED"):
        part = part.get(key) if isinstance(part, dict) else None
    if isinstance(part, dict) and part.get("FILE"):
        part["FILE"] = str(checkpoint)
    return content


def _of_lazy_config(config: str) -> dict[str, Any]:
    cfg = load_config(config)
    data = OmegaConf.to_container(cfg.get("dataloader") or OmegaConf.create({}), resolve=True)
    return {"model": instantiate(cfg.model), **_input(data, cfg.model)}


def _input(data: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return how photos are resized and ordered, and the names of the data sets."""
    mapper = ((data or {}).get("test") or {}).get("mapper") or {}
    steps = mapper.get("augmentations") or []
    steps = [steps] if isinstance(steps, Mapping) else steps
    edges = find_all(steps, "ResizeShortestEdge")
    if len(edges) < len(steps):
        names = [str(step.get("_target_") if isinstance(step, Mapping) else step) for step in steps]
        raise ValueError(f"test pictures of the run go through {names}; photos can only go through ResizeShortestEdge")
    sizes = [{key: edge[key] for key in ("short_edge_length", "max_size") if key in edge} for edge in edges]
    data_sets = [part["names"] for part in find_all(data, "get_detection_dataset_dicts") if "names" in part]
    return {
        "resize": ResizeShortestEdge(**sizes[0]) if sizes else None,
        # What the pictures of the run were read as; the model only draws by its own.
        "input_format": mapper.get("image_format") or model.get("input_format") or "BGR",
        "names": data_sets,
    }


def _of_yacs(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return model, input and data sets of a yacs config."""
    cfg = get_cfg()
    add_apt_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(dict(content)))
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
        model = build_model(cfg)
    except Exception as error:  # of yacs, and of whatever the config asks for
        raise ValueError(f"{path}: its model cannot be built: {' '.join(str(error).split())}") from error
    edges = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    resize = ResizeShortestEdge(edges, cfg.INPUT.MAX_SIZE_TEST) if edges[0] else None
    return {
        "model": model,
        "resize": resize,
        "input_format": cfg.INPUT.FORMAT,
        "names": [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN],
    }


def _backbone(model: nn.Module, path: Path) -> APTViT:
    found = next((module for module in model.modules() if isinstance(module, APTViT)), None)
    if found is None:
        raise ValueError(f"{path}: the model has no APTViT inside")
    return found


def _num_classes(model: nn.Module) -> int:
    """Return the number of classes of a detector of one or two stages."""
    for part in (getattr(model, "roi_heads", None), model, getattr(model, "head", None)):
        if isinstance(getattr(part, "num_classes", None), int):
            return part.num_classes
    raise ValueError(f"the number of classes of a {type(model).__name__} is not known")
