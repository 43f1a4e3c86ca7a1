"""Detections as a file in COCO's layout, which annotation tools and pycocotools read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from apt_dense.hosts.trained_model_types import Detections


def categories(ids: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return COCO's list of categories."""
    return [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]


def annotations(found: Detections, image_id: int, category_ids: Sequence[int], first_id: int) -> list[dict[str, Any]]:
    """Return COCO's entries of the objects in a picture, each with its score; masks as compressed run lengths."""
    corners = found.boxes.astype(float)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    entries = [
        {
            "id": first_id + place,
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(side, 2) for side in box],
            "area": round(box[2] * box[3], 2),
            "iscrowd": 0,
            "score": round(float(score), 4),
        }
        for place, (box, label, score) in enumerate(zip(boxes.tolist(), found.labels, found.scores, strict=True))
    ]
    for entry, mask in zip(entries, found.masks if found.masks is not None else ()):  # noqa: B905 (there may be none)
        entry["segmentation"], entry["area"] = _run_lengths(mask), int(mask.sum())
    return entries


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as rle

    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode()}
