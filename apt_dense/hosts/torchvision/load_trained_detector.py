"""Load what tools/train_det_torchvision.py wrote, ready to use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt_dense.hosts.torchvision.build_detector import build_model
from apt_dense.hosts.torchvision.safe_checkpoints import load_weights, read_run, settings_of
from apt_dense.hosts.trained_model_types import Detections, TrainedDetector, check_factor

MASK_THRESHOLD = 0.5  # torchvision returns soft masks


class TorchvisionDetector(TrainedDetector):
    """torchvision's Mask R-CNN or Faster R-CNN."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        transform = self.model.transform
        self._sizes = {name: getattr(transform, name) for name in ("min_size", "max_size", "fixed_size")}

    def scale_photos(self, factor: float) -> None:
        """Resize photos to ``factor`` times their size in the run's tests; see :class:`TrainedDetector`."""
        check_factor(factor)
        for name, size in self._sizes.items():
            setattr(self.model.transform, name, _scaled(size, factor))

    def _detect(self, photo: np.ndarray) -> Detections:
        (found,) = self.model([to_tensor(photo).to(self.device)])
        boxes, scores, labels = (found[name].float().cpu().numpy() for name in ("boxes", "scores", "labels"))
        masks = (found["masks"][:, 0] > MASK_THRESHOLD).cpu().numpy() if "masks" in found else None
        return Detections(boxes, scores, labels.astype(np.int64) - 1, masks)


def _scaled(size: int | Sequence[int] | None, factor: float) -> int | tuple[int, ...] | None:
    """Multiply pixels by a factor and round, to 1 at least."""
    if size is None:
        return None
    return max(1, round(size * factor)) if isinstance(size, int) else tuple(_scaled(each, factor) for each in size)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert (H, W, 3) uint8 to (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def load_trained_detector(path: Path) -> TorchvisionDetector:
    """Load a checkpoint of the tool on the CPU. Nothing but the checkpoint is read, and pickled code is never run.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged, of another kind, or does not fit itself.
    """
    checkpoint = read_run(path)
    category_ids, names = zip(*checkpoint["categories"], strict=True)
    model = build_model(settings_of(checkpoint, path), len(names) + 1, pretrained=False)
    load_weights(model, checkpoint["model"], path)
    return TorchvisionDetector(model, model.backbone.net, names, category_ids)
