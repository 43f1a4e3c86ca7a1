"""Score a torchvision detector with COCO's twelve numbers, for boxes and, where data have them, for masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense.hosts.torchvision.load_trained_detector import MASK_THRESHOLD
from apt_dense.hosts.torchvision.run_settings import TASKS

from torchvision_detection.batches import EvaluationImages, make_loader
from torchvision_detection.data import CocoSplit, index

#: In COCOeval's order: precision (all, IoU .5, IoU .75, small, medium, large), recall (1, 10, 100 detections; sizes).
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@torch.inference_mode()
def evaluate(
    model: nn.Module, split: CocoSplit, *, amp: bool = False, workers: int = 0, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Run a detector over a split and score it.

    Returns:
        {"bbox": {"AP": ..., ...}, "segm": {...}} with the numbers of ``METRICS`` in [0, 1], or -1 where there is no
        annotation to find (no small objects, say), as COCOeval has it. "segm" is there if the split has masks.
    """
    detections = detect(model, split, amp=amp, workers=workers, progress=progress)
    return {kind: coco_scores(split.coco, detections, kind) for kind in TASKS["masks" if split.masks else "boxes"]}


@torch.inference_mode()
def detect(
    model: nn.Module, split: CocoSplit, *, amp: bool = False, workers: int = 0, progress: bool = True
) -> list[dict]:
    """Run a detector over a split; return COCO's result entries of all its images."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    detections: list[dict] = []
    loader = make_loader(EvaluationImages(split), workers)
    for images, (image_id,) in tqdm(loader, "evaluating", unit="image", disable=not progress, leave=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            (prediction,) = model([image.to(device, non_blocking=True) for image in images])
        # Masks of a whole split would fill the memory; their run lengths do not.
        detections += detections_of(prediction, image_id, split.category_ids)
    model.train(training)
    return detections


def detections_of(prediction: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """Convert torchvision's prediction for an image to COCO's result entries, with box and, if there is one, mask.

    Args:
        prediction: boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 1, scores (n,) and, from Mask R-CNN,
            masks (n, 1, H, W) in [0, 1].
        category_ids: of the labels 1, 2, ...
    """
    corners = prediction["boxes"].float().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)  # COCO wants x, y, width, height
    entries = [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label) - 1],
            "bbox": box.tolist(),
            "score": float(score),
        }
        for box, label, score in zip(boxes, prediction["labels"], prediction["scores"], strict=True)
    ]
    for entry, mask in zip(entries, prediction.get("masks", ())):  # noqa: B905 (there may be none)
        pixels = np.asfortranarray((mask[0] > MASK_THRESHOLD).cpu().numpy().astype(np.uint8))
        entry["segmentation"] = rle.encode(pixels)
    return entries


def coco_scores(truth: COCO, detections: Sequence[Mapping], kind: str) -> dict[str, float]:
    """Compute COCOeval's numbers for "bbox" or "segm"."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        evaluation = COCOeval(truth, _results(truth, detections, kind), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True))


def _results(truth: COCO, detections: Sequence[Mapping], kind: str) -> COCO:
    """Index detections as pycocotools needs them for one kind of score."""
    if not detections:  # loadRes looks at the first one
        return index(truth.dataset | {"annotations": []})
    # With both a box and a mask, loadRes would sort masks into sizes by the area of their boxes.
    unused = "segmentation" if kind == "bbox" else "bbox"
    return truth.loadRes([{key: value for key, value in entry.items() if key != unused} for entry in detections])
