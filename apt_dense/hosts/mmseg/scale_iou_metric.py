"""A metric of MMSegmentation: IoU and boundary IoU under small and under large patches.

val_evaluator = [dict(type="IoUMetric"), dict(type="ScaleIoUMetric")]
custom_hooks = [dict(type="ScaleIoUMetricHook")]  # added by tools/train_seg.py and tools/eval_seg.py themselves
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import BaseLoop, Runner
from prettytable import PrettyTable
from torch import Tensor, nn

from apt_dense.hosts.find_patch_selector import find_patch_selector
from apt_dense.hosts.iou_by_scale import KINDS, Labelled, count_by_scale, groups_of_scales, ious
from apt_dense.hosts.mmseg.mask_pixels_per_class import type_name
from apt_dense.hosts.mmseg.scale_maps_of_test_images import scale_maps_of_batch
from apt_dense.patches.selector import PatchSelector

_NAMES = dict(zip(KINDS, ("mIoU", "mBoundaryIoU"), strict=True))


@METRICS.register_module()
class ScaleIoUMetric(BaseMetric):
    """mIoU and mean boundary IoU (Cheng et al. 2021, arXiv 2103.16562), in %, by the scale of the patch under each
    pixel.

    Names end in "_fine" (smallest patches), "_coarse" (all others) and, with several larger sizes, "_scale1", ...
    "mBoundaryIoU" is that of all pixels, and "coarse_pixels" the share of labelled pixels under coarse patches. Pixels
    whose patch was dropped as padding are in no group, and groups without a labelled pixel have no value. A table in
    the log has the classes. Sums run over the data set, as in ``IoUMetric``, and leave out pixels of no class. These
    and the image's edges are no border; in the paper's code, the edges are one.

    Coarse patches lie where an image is flat and labels are easy, so do not compare the groups with each other. Compare
    each with the same group of the plain ViT: test once as it is, and once with ``model.backbone.thresholds=()`` and
    these ``thresholds`` in the metric.

    Args:
        ignore_index: label of pixels of no class.
        thresholds: to group pixels by the patches that these would make, such as (5.5, 4.0); None for the model's own.
        border_share: distance to a border up to which boundary IoU counts, as a share of the image's diagonal.
        collect_device, prefix: as for ``BaseMetric``.

    Raises:
        ValueError, TypeError: for thresholds that make no sense.
        ValueError: while testing, if there is no ``ScaleIoUMetricHook``, the model has no ``APTViT``, or the data have
            no labels.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        thresholds: Sequence[float] | None = None,
        border_share: float = 0.02,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix)
        PatchSelector(thresholds=thresholds or ())  # fails before training, not at the first validation
        self.ignore_index, self.thresholds, self.border_share = ignore_index, thresholds, border_share
        self.model: nn.Module | None = None

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Count the pixels of a batch."""
        segmentor = unwrapped(self.model)
        selector = find_patch_selector(segmentor, self.thresholds)
        scale_maps = scale_maps_of_batch(segmentor, selector, data_batch)
        for sample, scales in zip(data_samples, scale_maps, strict=True):
            if "gt_sem_seg" not in sample:
                raise ValueError("ScaleIoUMetric needs labels, but the data have none; leave it out of the evaluators")
            prediction, truth = (_label_map(sample[name]["data"]) for name in ("pred_sem_seg", "gt_sem_seg"))
            self.results.append(count_by_scale(
                Labelled(prediction, truth, scales), len(self.dataset_meta["classes"]), selector.num_scales,
                void=self.ignore_index, border_share=self.border_share,
            ))  # fmt: skip

    def compute_metrics(self, results: Sequence[np.ndarray]) -> dict[str, float]:
        """Sum up the counts of all images, and log the classes."""
        counts = np.sum(results, axis=0, dtype=np.int64)
        found: dict[str, np.ndarray] = {}
        for group, rows in groups_of_scales(len(counts) - 1).items():
            for kind, values in zip(KINDS, ious(counts[rows].sum(0)), strict=True):
                if np.isfinite(values).any() and (group, kind) != ("all", "all"):  # which is IoUMetric's
                    found[_NAMES[kind] + ("" if group == "all" else f"_{group}")] = 100 * values
        self._log_classes(found)
        labelled = counts[:, 0, 2].sum(1)
        share = {"coarse_pixels": 100 * labelled[2:].sum() / labelled.sum()} if labelled.any() else {}
        values = {name: np.nanmean(values) for name, values in found.items()} | share
        return {name: round(float(value), 2) for name, value in values.items()}

    def _log_classes(self, found: Mapping[str, np.ndarray]) -> None:
        table = PrettyTable()
        table.add_column("Class", list(self.dataset_meta["classes"]))
        for name, values in found.items():
            table.add_column(name.removeprefix("m"), np.round(values, 2))
        print_log(f"by the scale of the patch under each pixel:\n{table.get_string()}", "current")


@HOOKS.register_module()
class ScaleIoUMetricHook(Hook):
    """Tell each :class:`ScaleIoUMetric` of a run the model whose patches it looks at."""

    def before_val_epoch(self, runner: Runner) -> None:
        """Look for metrics of validations."""
        _tell(runner.val_loop, runner.model)

    def before_test_epoch(self, runner: Runner) -> None:
        """Look for metrics of tests."""
        _tell(runner.test_loop, runner.model)


def _tell(loop: BaseLoop, model: nn.Module) -> None:
    for metric in loop.evaluator.metrics:
        if isinstance(metric, ScaleIoUMetric):
            metric.model = model


def unwrapped(model: nn.Module | None) -> nn.Module:
    """Return the segmentor inside of DistributedDataParallel, test-time augmentation, or both. Raises ValueError."""
    if model is None:
        raise ValueError(
            'ScaleIoUMetric does not know the model whose patches it looks at; add dict(type="ScaleIoUMetricHook") to '
            "custom_hooks (tools/train_seg.py and tools/eval_seg.py do)"
        )
    while hasattr(model, "module"):
        model = model.module
    return model


def _label_map(data: Tensor) -> np.ndarray:
    """(1, H, W) of a data sample, without the first axis."""
    return data[0].cpu().numpy().astype(np.int64)


def add_metric(cfg: Config, thresholds: Sequence[float] | None) -> None:
    """Add the metric to the evaluators of a test, or give the one that is there these thresholds."""
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
    others = [one for one in evaluators if type_name(one) != ScaleIoUMetric.__name__]
    own = [one for one in evaluators if type_name(one) == ScaleIoUMetric.__name__]
    metric = dict(own[0]) if own else {"type": ScaleIoUMetric.__name__}
    for other in others:  # which all leave out the same labels
        if not own and "ignore_index" in other:
            metric["ignore_index"] = other["ignore_index"]
    cfg.test_evaluator = [*others, {**metric, "thresholds": thresholds}]
    add_hook(cfg)


def add_hook(cfg: Config) -> None:
    """Add the hook that the metric needs, if an evaluator of the config is one."""
    hook = ScaleIoUMetricHook.__name__
    evaluators = [cfg.get(key) or [] for key in ("val_evaluator", "test_evaluator")]
    listed = [one for some in evaluators for one in (some if isinstance(some, list | tuple) else [some])]
    hooks = cfg.get("custom_hooks") or []
    if any(type_name(one) == ScaleIoUMetric.__name__ for one in listed) and hook not in map(type_name, hooks):
        cfg.custom_hooks = [*hooks, {"type": hook}]
