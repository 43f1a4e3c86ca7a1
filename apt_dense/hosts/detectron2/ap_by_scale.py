"""Detectron2's evaluation of AP by the share of coarse patches under objects: ``train.ap_by_scale=True``."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from torch import nn

from apt_dense.hosts.coco_ap_by_scale import SharesUnderObjects, ap_by_coarse_share, gathered, read_truth
from apt_dense.hosts.detectron2.safe_checkpoints import unwrapped
from apt_dense.hosts.find_patch_selector import find_patch_selector


class APByScaleEvaluator(DatasetEvaluator):
    """AP of objects under small patches, under both, and under large ones, next to Detectron2's ``COCOEvaluator``.

    Results are "bbox_by_scale" and, with masks, "segm_by_scale": in %, as :func:`ap_by_coarse_share` names them. The
    patches are those that the model makes of each image as it preprocesses it.

    Args:
        dataset_name: a registered data set in COCO's layout.
        model: the detector that is tested, around an ``APTViT``.
        thresholds: to group objects by the patches that these would make; None for the model's own.

    Raises:
        ValueError, TypeError: if there is no such data set, model or choice of patches.
    """

    def __init__(self, dataset_name: str, model: nn.Module, thresholds: Sequence[float] | None = None) -> None:
        self._model, self._thresholds = unwrapped(model), thresholds
        if not hasattr(self._model, "preprocess_image"):
            raise ValueError(
                f"{type(self._model).__name__} has no preprocess_image, so the patches of an image are not known; "
                f"leave AP by scale out, or use a model such as GeneralizedRCNN"
            )
        find_patch_selector(self._model, thresholds)
        self._metadata = MetadataCatalog.get(dataset_name)
        if self._metadata.get("json_file") is None:
            raise ValueError(f"AP by scale needs a data set in COCO's layout; {dataset_name!r} has no json_file")
        self.reset()

    @cached_property
    def _truth(self) -> COCO:
        """The annotations, read when the first batch comes: trainings build an evaluator only to check its options."""
        return read_truth(PathManager.get_local_path(self._metadata.json_file))

    def reset(self) -> None:
        """Forget the images so far. Detectron2 calls this before a test."""
        self._found, self._has_masks = SharesUnderObjects(), False

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch: Detectron2's dictionaries of images, and of their "instances"."""
        # Looked for each time: a schedule may have replaced it.
        selector = find_patch_selector(self._model, self._thresholds)
        scale_maps = selector.scale_map(self._model.preprocess_image(inputs).tensor).cpu().numpy()
        for image, output, scale_map in zip(inputs, outputs, scale_maps, strict=True):
            height, width = image["image"].shape[-2:]  # as resized; annotations are in pixels of the file
            across, down = width / image.get("width", width), height / image.get("height", height)
            cells = across / selector.patch_size, down / selector.patch_size
            self._has_masks |= output["instances"].has("pred_masks")
            detections = self._detections(output["instances"].to("cpu"), image["image_id"])
            self._found.add(image["image_id"], scale_map, cells, self._truth, detections)

    def _detections(self, instances: Instances, image_id: int) -> list[dict[str, Any]]:
        if instances.has("pred_keypoints"):
            instances.remove("pred_keypoints")  # which would be moved in place
        entries = instances_to_coco_json(instances, image_id)
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        categories = {label: category for category, label in labels.items()}
        return [{**one, "category_id": categories.get(one["category_id"], one["category_id"])} for one in entries]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what all processes have tested: results on the main process, nothing on others."""
        comm.synchronize()
        parts = comm.gather((self._found, self._has_masks), dst=0)
        if not comm.is_main_process():
            return {}
        found, kinds = gathered(part for part, _ in parts), ["bbox", *["segm"] * any(masks for _, masks in parts)]
        scores = {kind: ap_by_coarse_share(self._truth, found, kind) for kind in kinds}
        return {f"{kind}_by_scale": {name: _percent(name, v) for name, v in scores[kind].items()} for kind in kinds}


def _percent(name: str, value: float) -> float:
    """As Detectron2 gives AP: in %, and NaN where there is no object."""
    if not name.startswith("AP"):
        return value
    return 100 * value if value >= 0 else float("nan")
