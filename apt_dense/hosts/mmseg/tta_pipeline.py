"""Test-time augmentation of any test pipeline: six scales, each with its mirror image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

RATIOS = 0.5, 0.75, 1.0, 1.25, 1.5, 1.75  # MMSegmentation's
_RESIZES = "Resize", "ResizeShortestEdge"
_SIZES = "scale", "scale_factor", "max_size"
_FLIPS = "flip", "flip_direction"  # by which predictions are mirrored back


def augmented(pipeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make the pipeline of a test with augmentation from one without: images are loaded once, then resized to each of
    ``RATIOS`` times the size that the pipeline gives them, mirrored, and everything else follows.

    So masks, which the metric compares at their own size, are loaded after that, wherever the pipeline loads them.

    Raises:
        ValueError: if the pipeline does not begin with loading an image, or resizes in a way that is not known.
    """
    kinds = [str(step.get("type")).rpartition(".")[2] for step in pipeline]
    if "TestTimeAug" in kinds:
        return [dict(step) for step in pipeline]
    resizes = [step for step, kind in zip(pipeline, kinds, strict=True) if kind in _RESIZES]
    unknown = [kind for kind in kinds if kind.startswith(("RandomResize", "RandomChoiceResize", "RandomFlip"))]
    if not kinds or not kinds[0].removeprefix("APT").startswith("Load") or len(resizes) > 1 or unknown:
        raise ValueError(
            f"--tta cannot be derived from the test pipeline {kinds}: expected loading of the image first, one "
            f"{' or '.join(_RESIZES)} at most, and nothing random; add tta_pipeline to the config (loading, then "
            f"TestTimeAug; see configs/mmseg/_base_/ade20k_512.py)"
        )
    resize = resizes[0] if resizes else {"type": "Resize", "scale_factor": 1.0, "keep_ratio": True}
    rest = [_with_flips(step, kind) for step, kind in zip(pipeline, kinds, strict=True) if kind not in _RESIZES][1:]
    mirrors = [{"type": "RandomFlip", "prob": prob, "direction": "horizontal"} for prob in (0.0, 1.0)]
    steps = [[_scaled(resize, ratio) for ratio in RATIOS], mirrors, *([step] for step in rest)]
    return [dict(pipeline[0]), {"type": "TestTimeAug", "transforms": steps}]


def _scaled(resize: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Multiply the sizes of a step that resizes."""
    sizes = {name: resize[name] for name in _SIZES if resize.get(name) is not None}
    return {**resize, **{name: _times(size, ratio) for name, size in sizes.items()}}


def _times(size: Any, ratio: float) -> Any:
    """Multiply numbers: pixels stay whole, and -1 and infinity, which stand for any size, stay themselves."""
    if isinstance(size, Sequence):
        return tuple(_times(side, ratio) for side in size)
    if size < 0 or not math.isfinite(size):
        return size
    return round(size * ratio) if isinstance(size, int) else size * ratio


def _with_flips(step: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Let the last step keep what says that an image is mirrored."""
    if not kind.startswith("Pack") or "meta_keys" not in step:
        return dict(step)
    return {**step, "meta_keys": tuple(dict.fromkeys([*step["meta_keys"], *_FLIPS]))}
