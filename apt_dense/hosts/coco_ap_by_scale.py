"""COCO's AP of objects split by the share of coarse patches under their boxes: fine, mixed, coarse.

As COCO does for small, medium and large objects: objects of other groups, and detections that match nothing and lie in
other groups, are ignored. Only the area is replaced by the share.

Compare a group with the same group of another model (the plain ViT, grouped by the same patches), not with the other
groups: coarse patches lie where an image is flat, which large and easy objects are.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

#: Shares of coarse cells under the box: none, up to half, more than half. They are rounded to six digits.
GROUPS = {"fine": (0.0, 0.0), "mixed": (1e-6, 0.5), "coarse": (0.500001, 1.0)}
SMALL = 32**2  # pixels of COCO's small objects, at most
_DIGITS = 6
_LEAST_EXTENT = 0.01  # cells; of less, the table of sums is not exact enough
_IGNORED = -1.0  # a share of no group


@dataclass(frozen=True)
class SharesUnderObjects:
    """Objects and detections of the images that were tested.

    Args:
        objects: share of coarse patches by id of the annotation.
        detections: COCO's result entries, each with its "coarse_share".
        images: ids.
    """

    objects: dict[int, float] = field(default_factory=dict)
    detections: list[dict[str, Any]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def add(
        self,
        image_id: int,
        scale_map: np.ndarray,
        cells_per_pixel: tuple[float, float],
        truth: COCO,
        detections: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add an image.

        Args:
            scale_map: (h, w) integers: the scale of the patch over each cell.
            cells_per_pixel: across and down, of the pixels that annotations and detections are in.
            detections: COCO's result entries of this image, each with a "bbox".
        """
        objects = truth.imgToAnns.get(image_id, [])
        boxes = [entry["bbox"] for entry in (*objects, *detections)]
        shares = coarse_shares(scale_map, np.array(boxes, float).reshape(-1, 4) * np.tile(cells_per_pixel, 2)).tolist()
        self.images.append(image_id)
        self.objects.update(zip((entry["id"] for entry in objects), shares, strict=False))
        self.detections.extend(
            {**entry, "coarse_share": share} for entry, share in zip(detections, shares[len(objects) :], strict=True)
        )


def gathered(parts: Iterable[SharesUnderObjects]) -> SharesUnderObjects:
    """Join what several processes have tested."""
    found = SharesUnderObjects()
    for part in parts:
        found.objects.update(part.objects)
        found.detections.extend(part.detections)
        found.images.extend(part.images)
    return found


def coarse_shares(scale_map: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The share (n,) of each box that lies on cells of coarse patches; 0 outside of the map.

    Args:
        scale_map: (h, w) integers: the scale of the patch over each cell, -1 for none.
        boxes: (n, 4) as x, y, width, height in cells. One without an extent counts as a point.
    """
    sums = np.zeros(np.add(scale_map.shape, 1))
    sums[1:, 1:] = (scale_map > 0).cumsum(0).cumsum(1)
    x, y, width, height = np.asarray(boxes, float).reshape(-1, 4).T
    width, height = np.maximum(width, _LEAST_EXTENT), np.maximum(height, _LEAST_EXTENT)
    corners = [_sum_up_to(sums, x + dx, y + dy) for dy in (0, height) for dx in (0, width)]
    covered = corners[3] - corners[2] - corners[1] + corners[0]
    return np.clip(covered / (width * height), 0, 1).round(_DIGITS)


def _sum_up_to(sums: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Read a summed-area table (h + 1, w + 1) between its entries, which is exact within a cell."""
    rows, columns = np.clip(y, 0, sums.shape[0] - 1), np.clip(x, 0, sums.shape[1] - 1)
    top, left = rows.astype(int), columns.astype(int)
    bottom, right = np.minimum(top + 1, sums.shape[0] - 1), np.minimum(left + 1, sums.shape[1] - 1)
    down, across = rows - top, columns - left
    upper = sums[top, left] * (1 - across) + sums[top, right] * across
    lower = sums[bottom, left] * (1 - across) + sums[bottom, right] * across
    return upper * (1 - down) + lower * down


def ap_by_coarse_share(truth: COCO, found: SharesUnderObjects, kind: str) -> dict[str, float]:
    """AP in [0, 1], or -1 where there is no object, of each group.

    Args:
        truth: annotations, with the images that were tested.
        kind: "bbox" or "segm".

    Returns:
        "AP_fine", "AP_mixed", "AP_coarse", the same of small objects as "APs_fine", ..., and the number of objects in
        each group as "objects_fine", ..., "small_objects_fine", ....
    """
    scores, numbers = {}, {}
    for small, letter, prefix in ((False, "", ""), (True, "s", "small_")):
        objects, results = _by_share(truth, found, small), _results(truth, found.detections, kind, small)
        counted = [a["area"] for a in objects.dataset["annotations"] if not a.get("iscrowd")]
        values = _average_precisions(objects, results, kind, found.images)
        for group, value in zip(GROUPS, values, strict=True):
            low, high = GROUPS[group]
            scores[f"AP{letter}_{group}"] = value
            numbers[f"{prefix}objects_{group}"] = float(sum(low <= share <= high for share in counted))
    return scores | numbers


def read_truth(path: str) -> COCO:
    """Read an annotation file without pycocotools' messages."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def _by_share(truth: COCO, found: SharesUnderObjects, small: bool) -> COCO:
    """Annotations with the share in place of the area; with ``small``, larger objects are in no group."""
    shares = found.objects
    return _indexed(truth, [
        {**entry, "area": _IGNORED if small and entry["area"] > SMALL else shares.get(entry["id"], _IGNORED)}
        for entry in truth.dataset["annotations"]
    ])  # fmt: skip


def _results(truth: COCO, detections: Sequence[Mapping[str, Any]], kind: str, small: bool) -> COCO:
    """The same of detections, whose area is that of box or mask, as their kind of score has it."""
    unused = "segmentation" if kind == "bbox" else "bbox"
    entries = [{key: value for key, value in entry.items() if key != unused} for entry in detections]
    if not entries:  # loadRes looks at the first one
        return _indexed(truth, [])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        results = truth.loadRes(entries)
    for entry in results.dataset["annotations"]:
        entry["area"] = _IGNORED if small and entry["area"] > SMALL else entry["coarse_share"]
    return results


def _indexed(truth: COCO, annotations: list[dict[str, Any]]) -> COCO:
    indexed = COCO()
    indexed.dataset = truth.dataset | {"annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        indexed.createIndex()
    return indexed


def _average_precisions(truth: COCO, results: COCO, kind: str, images: Sequence[int]) -> list[float]:
    """AP of each group: the mean over IoUs, recalls and classes, as COCOeval's summary makes it."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, results, kind)
        evaluation.params.imgIds = sorted(set(images))
        evaluation.params.areaRng = [list(bounds) for bounds in GROUPS.values()]
        evaluation.params.areaRngLbl = list(GROUPS)
        evaluation.evaluate()
        evaluation.accumulate()
    values = np.moveaxis(evaluation.eval["precision"][..., -1], -1, 0)  # of at most 100 detections an image
    return [float(np.mean(group[group > -1])) if (group > -1).any() else -1.0 for group in values]
