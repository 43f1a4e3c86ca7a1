"""Parts of a lazy config that concern patches: the schedule, expected tokens and AP by scale in ``train``, and the
pixel format of the images."""

import logging

from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from apt_dense.hosts.anneal_patches import AnnealedPatches
from apt_dense.hosts.detectron2.ap_by_scale import APByScaleEvaluator
from apt_dense.hosts.detectron2.patch_schedule_hook import PatchScheduleHook
from apt_dense.hosts.detectron2.token_drift_hook import TokenDriftHook
from apt_dense.hosts.pixel_agreement import pixel_disagreement

logger = logging.getLogger(__name__)


class PatchOptionError(ValueError):
    """Options about patches that make no sense. Tools report it in one line."""


def patch_schedule_hook(cfg: DictConfig, model: nn.Module) -> HookBase | None:
    """The hook that ``train.patch_schedule`` asks for. Raises PatchOptionError unless the model can follow it."""
    options = cfg.train.get("patch_schedule")
    if options is None:
        return None
    try:
        hook = PatchScheduleHook(**options)
        AnnealedPatches(model, hook.schedule, cfg.train.max_iter)
    except (TypeError, ValueError) as error:
        raise PatchOptionError(f"train.patch_schedule={options}: {error}") from error
    return hook


def token_drift_hook(cfg: DictConfig) -> HookBase | None:
    """The hook that ``train.expected_tokens`` asks for. Raises PatchOptionError unless it is a share."""
    expected = cfg.train.get("expected_tokens")
    try:
        return None if expected is None else TokenDriftHook(expected)
    except (TypeError, ValueError) as error:
        raise PatchOptionError(f"train.expected_tokens: {error}") from error


def ap_by_scale_evaluators(cfg: DictConfig, model: nn.Module) -> list[DatasetEvaluator]:
    """The evaluator that ``train.ap_by_scale`` asks for: True for the model's own patches, or thresholds. Raises
    PatchOptionError unless they are patches of the model, and the data are one set in COCO's layout."""
    option = cfg.train.get("ap_by_scale")
    if option in (None, False) or cfg.dataloader.get("evaluator") is None:
        return []
    names = cfg.dataloader.test.dataset.names
    names = [names] if isinstance(names, str) else list(names)
    try:
        if option is not True and not OmegaConf.is_list(option):
            raise ValueError("expected True for the model's own patches, or thresholds such as [5.5,4.0]")
        if len(names) != 1:
            raise ValueError(f"expected one data set in dataloader.test.dataset.names, found {names}")
        return [APByScaleEvaluator(names[0], model, None if option is True else tuple(option))]
    except (TypeError, ValueError) as error:
        raise PatchOptionError(f"train.ap_by_scale={option}: {error}") from error


def check_pixels(cfg: DictConfig, model: nn.Module, split: str, is_new: bool) -> None:
    """Compare the images that the backbone expects with what the model and a loader make of them: their normalisation
    and the order of their channels. A model without ``pixel_mean`` passes.

    Args:
        split: the loader's name, "train" or "test".
        is_new: whether nothing is trained yet, so that the config can still be mended; else a difference is logged.

    Raises:
        PatchOptionError: if they differ, and ``is_new``.
    """
    if getattr(model, "pixel_mean", None) is None:
        return
    order = OmegaConf.select(cfg, f"dataloader.{split}.mapper.image_format")
    found = pixel_disagreement(model, model.pixel_mean, model.pixel_std, order if order in ("RGB", "BGR") else None)
    if found and is_new:
        raise PatchOptionError(f"model.pixel_mean, model.pixel_std or image_format of a mapper: {found}")
    if found:
        logger.warning("%s (trained so, the model has learned to live with the patches that it got)", found)
