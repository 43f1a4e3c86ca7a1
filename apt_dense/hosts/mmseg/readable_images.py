"""Images that cannot be read while MMSegmentation trains or tests: one line that names the file."""

from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS


class DataError(ValueError):
    """A file of a data set cannot be used. Tools report it in one line (``line_of``)."""


@TRANSFORMS.register_module()
class APTLoadImage(LoadImageFromFile):
    """MMCV's LoadImageFromFile, with an error that names the file."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Read ``results["img_path"]``.

        Raises:
            DataError: if it is missing, empty, damaged or no image.
        """
        try:
            return super().transform(results)
        except (AssertionError, OSError, SyntaxError, ValueError, cv2.error) as error:
            raise DataError(
                f"{results['img_path']} is not a readable image ({type(error).__name__}); replace it, or take it and "
                f"its mask out of the data"
            ) from error


def name_unreadable_images(pipeline: Any) -> None:
    """Let MMCV's LoadImageFromFile in a pipeline's config, also inside of other steps, be an APTLoadImage."""
    if isinstance(pipeline, dict):
        mmcvs = TRANSFORMS.get("LoadImageFromFile") is LoadImageFromFile  # not one that a user has put there
        if mmcvs and pipeline.get("type") in ("LoadImageFromFile", LoadImageFromFile):
            pipeline["type"] = "APTLoadImage"
    for child in pipeline.values() if isinstance(pipeline, dict) else pipeline if isinstance(pipeline, list) else ():
        name_unreadable_images(child)


def line_of(error: Exception) -> str:
    """The message of a DataError, which comes out of a worker inside of a traceback."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].rpartition(f"{DataError.__name__}: ")[2]
