"""Images and masks that cannot be read while MMSegmentation trains or tests: one line that names the file."""

import os
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS as STEPS

from apt_dense.hosts.readable_images import DataError, check_whole

_UNREADABLE = AssertionError, AttributeError, OSError, SyntaxError, ValueError, cv2.error  # some decoders return None


@TRANSFORMS.register_module()
class APTLoadImage(LoadImageFromFile):
    """MMCV's LoadImageFromFile, with an error that names the file."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read ``results["img_path"]``.

        Raises:
            DataError: if it is missing, empty, cut off, damaged or no image.
        """
        try:
            if os.path.isfile(results["img_path"]):  # not in remote storage
                check_whole(results["img_path"])
            return super().transform(results)
        except DataError:
            raise
        except _UNREADABLE as error:
            raise DataError(
                f"{results['img_path']} is not a readable image ({type(error).__name__}); replace it, or take it and "
                f"its mask out of the data"
            ) from error


@TRANSFORMS.register_module()
class APTLoadAnnotations(LoadAnnotations):
    """MMSegmentation's LoadAnnotations, with an error that names the file."""

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        try:
            super()._load_seg_map(results)
        except _UNREADABLE as error:
            if "reduce_zero_label" in str(error):  # the config's mistake
                raise
            raise DataError(
                f"{results['seg_map_path']} is not a readable mask ({type(error).__name__}); replace it, or take it "
                f"and its image out of the data"
            ) from error


def name_unreadable_files(pipeline: Any) -> None:
    """Let MMCV's LoadImageFromFile in a pipeline's config, also inside of other steps, be an APTLoadImage, and
    MMSegmentation's LoadAnnotations an APTLoadAnnotations."""
    if isinstance(pipeline, dict):
        mmcvs = TRANSFORMS.get("LoadImageFromFile") is LoadImageFromFile  # not one that a user has put there
        if mmcvs and pipeline.get("type") in ("LoadImageFromFile", LoadImageFromFile):
            pipeline["type"] = "APTLoadImage"
        mmsegs = STEPS.get("LoadAnnotations") is LoadAnnotations
        if mmsegs and pipeline.get("type") in ("LoadAnnotations", LoadAnnotations):
            pipeline["type"] = "APTLoadAnnotations"
    for child in pipeline.values() if isinstance(pipeline, dict) else pipeline if isinstance(pipeline, list) else ():
        name_unreadable_files(child)
