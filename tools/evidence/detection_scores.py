"""COCO's scores of detections, in per cent."""

from collections.abc import Mapping, Sequence

from pycocotools.coco import COCO

from torchvision_detection.evaluation import coco_scores

SCORES = "AP", "AP50", "APs", "APm", "APl"


def scores_in_per_cent(truth: COCO, entries: Sequence[Mapping], kind: str) -> dict[str, float | None]:
    """Return ``SCORES`` of "bbox" or "segm"; None where there is nothing to find."""
    found = coco_scores(truth, entries, kind)
    return {name: None if found[name] < 0 else 100 * found[name] for name in SCORES}
