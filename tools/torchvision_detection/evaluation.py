"""Score a torchvision detector with COCO's twelve numbers, for boxes and, where data have them, for masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense.hosts.coco_ap_by_scale import SharesUnderObjects, ap_by_coarse_share
from apt_dense.hosts.find_patch_selector import find_patch_selector
from apt_dense.hosts.torchvision.load_trained_detector import MASK_THRESHOLD
from apt_dense.hosts.torchvision.run_settings import TASKS

from torchvision_detection.batches import EvaluationImages, make_loader
from torchvision_detection.data import CocoSplit, index

#: In COCOeval's order: precision (all, IoU .5, IoU .75, small, medium, large), recall (1, 10, 100 detections; sizes).
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: CocoSplit,
    *,
    amp: bool = False,
    workers: int = 0,
    progress: bool | str = True,
    by_scale: Sequence[float] | None = None,
) -> dict[str, dict[str, float]]:
    """Run a detector over a split and score it.

    Args:
        progress: show a bar, under this title if it is a text.
        by_scale: to score objects also by the share of coarse patches under them: the thresholds that make these
            patches, empty for the model's own.

    Returns:
        {"bbox": {"AP": ..., ...}, "segm": {...}} with the numbers of ``METRICS`` in [0, 1], or -1 where there is no
        annotation to find (no small objects, say), as COCOeval has it. "segm" is there if the split has masks. With
        ``by_scale``, "bbox_by_scale" and "segm_by_scale" have the numbers of ``ap_by_coarse_share``.

    Raises:
        ValueError, TypeError: for ``by_scale`` that is no thresholds, or a model without adaptive patches.
    """
    found, kinds = SharesUnderObjects(), TASKS["masks" if split.masks else "boxes"]
    note = None if by_scale is None else shares_noted_in(found, model, split, by_scale)
    detections = detect(model, split, amp=amp, workers=workers, progress=progress, note=note)
    scores = {kind: coco_scores(split.coco, detections, kind) for kind in kinds}
    if note is not None:
        scores |= {f"{kind}_by_scale": ap_by_coarse_share(split.coco, found, kind) for kind in kinds}
    return scores


#: Takes an image (3, H, W), its id and the entries of its detections.
Note = Callable[[Tensor, int, list[dict]], None]


def shares_noted_in(found: SharesUnderObjects, model: nn.Module, split: CocoSplit, thresholds: Sequence[float]) -> Note:
    """Make a function that adds an image to ``found``, with the patches that the model makes of it, or those of
    thresholds if there are any. Raises as ``find_patch_selector``."""
    selector = find_patch_selector(model, thresholds or None)

    def note(image: Tensor, image_id: int, detections: list[dict]) -> None:
        batch, _ = model.transform([image])  # as the backbone gets it
        scale_map = selector.scale_map(batch.tensors)[0].cpu().numpy()
        height, width = (
            new / old / selector.patch_size for new, old in zip(batch.image_sizes[0], image.shape[1:], strict=True)
        )
        found.add(image_id, scale_map, (width, height), split.coco, detections)

    return note


@torch.inference_mode()
def detect(
    model: nn.Module,
    split: CocoSplit,
    *,
    amp: bool = False,
    workers: int = 0,
    progress: bool | str = True,
    note: Note | None = None,
) -> list[dict]:
    """Run a detector over a split; return COCO's result entries of all its images. Arguments as for ``evaluate``.

    Args:
        note: called with each image and its detections.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    detections: list[dict] = []
    loader = make_loader(EvaluationImages(split), workers)
    title = progress if isinstance(progress, str) else "evaluating"
    for (image,), (image_id,) in tqdm(loader, title, unit="image", disable=not progress, leave=False):
        image = image.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            (prediction,) = model([image])
        # Masks of a whole split would fill the memory; their run lengths do not.
        entries = detections_of(prediction, image_id, split.category_ids)
        if note is not None:
            note(image, image_id, entries)
        detections += entries
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


def score_where_right_ones_dominate(truth: COCO, detections: Sequence[Mapping], share: float = 0.7) -> float:
    """Find the lowest score above which at least ``share`` of the boxes are right: of the class of an object that they
    share half of their area with, and the first to do so. Returns 1 if there is none.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _results(truth, detections, "bbox"), "bbox")
        evaluation.params.iouThrs, evaluation.params.areaRng = np.array([0.5]), evaluation.params.areaRng[:1]
        evaluation.evaluate()
    found = [entry for entry in evaluation.evalImgs if entry is not None]
    counted = [~entry["dtIgnore"][0].astype(bool) for entry in found]
    scores = [np.array(entry["dtScores"])[kept] for entry, kept in zip(found, counted, strict=True)]
    right = [entry["dtMatches"][0][kept] > 0 for entry, kept in zip(found, counted, strict=True)]
    scores, right = (np.concatenate([np.zeros(0), *parts]) for parts in (scores, right))
    order = np.argsort(-scores, kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(precision >= share)
    return float(scores[order][enough[-1]]) if len(enough) else 1.0


def _results(truth: COCO, detections: Sequence[Mapping], kind: str) -> COCO:
    """Index detections as pycocotools needs them for one kind of score."""
    if not detections:  # loadRes looks at the first one
        return index(truth.dataset | {"annotations": []})
    # With both a box and a mask, loadRes would sort masks into sizes by the area of their boxes.
    unused = "segmentation" if kind == "bbox" else "bbox"
    return truth.loadRes([{key: value for key, value in entry.items() if key != unused} for entry in detections])
