"""The training step of a config of MMSegmentation or Detectron2, or of a detector that train_det_torchvision trains, on
photos with labels drawn at random."""

from collections.abc import Callable, Mapping

from torch import Tensor

from apt_dense import APTViT
from apt_dense.hosts.torchvision.build_detector import build_model
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.options import PixelFormat
from apt_dense.patches.image_preparation import denormalise

from benchmarks.detectors import CLASSES, detectron2_batch, detectron2_losses, torchvision_batch
from benchmarks.photos import photos
from benchmarks.segmentors import drawn_labels, segmentor_losses
from benchmarks.step_parts import Step
from evidence.model_forms import set_thresholds
from shared.normalise import normalise
from shared.thresholds_for_share import scores_of, thresholds_for
from shared.token_counts import choose_patches

#: Where a segmentor's backbone gets its weights; a step's time does not depend on them.
_WEIGHTS = {"pretrained": None, "init_cfg": None}


def segmentor_step(config: str, batch: int, keep: float | None) -> tuple[Step, float]:
    """The step of a segmentor at its config's size, and the share of tokens kept.

    Args:
        keep: the share that thresholds are scaled to; None for the config's own.

    Raises:
        FileNotFoundError, ValueError: if the config cannot be read, or is not one of an APTViT at one square size.
    """
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    from apt_dense.hosts.mmseg.training_config import load_config

    cfg = load_config(config)
    if (cfg.model.get("backbone") or {}).get("type") != "APTViT":
        raise ValueError(f"{config}: its backbone is not an APTViT")
    cfg.model.backbone.update(_WEIGHTS)
    size = _square(config, cfg.model.data_preprocessor.size)
    init_default_scope("mmseg")
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    _, images, share = _images(model.backbone, size, batch, keep)
    samples = drawn_labels(images, model.decode_head.num_classes)
    return Step(model, lambda: sum(segmentor_losses(model, images, samples).values())), share


def detector_step(config: str, batch: int, keep: float | None) -> tuple[Step, float]:
    """The step of a detector at its config's size, and the share of tokens kept; see :func:`segmentor_step`."""
    from detectron2.config import instantiate

    from apt_dense.hosts.detectron2.read_lazy_config import load_config

    cfg = load_config(config)
    model = instantiate(cfg.model).train()
    net = next((module for module in model.modules() if isinstance(module, APTViT)), None)
    if net is None:
        raise ValueError(f"{config}: its backbone is not an APTViT")
    images, _, share = _images(net, _square(config, net.img_size), batch, keep)
    samples = detectron2_batch(images)
    return Step(model, lambda: sum(detectron2_losses(model, samples).values())), share


def torchvision_step(model: str, batch: int, keep: float | None) -> tuple[Step, float]:
    """The step of the trainer's Mask R-CNN, by default at 1024 pixels; see :func:`segmentor_step`.

    Args:
        model: one of the trainer's own or a timm ViT's name; "NAME@SIZE" for another size.

    Raises:
        ValueError: if there is no such model, or the size is not whole pixels.
    """
    name, at, size = model.partition("@")
    if at and not size.isdecimal():
        raise ValueError(f"{model}: expected NAME or NAME@SIZE, as in vit_base@1024")
    settings = Settings(model=name, **({"size": int(size)} if at else {}))
    detector = build_model(settings, CLASSES + 1, pretrained=False).train()
    images, _, share = _images(detector.backbone.net, (settings.size, settings.size), batch, keep)
    samples = torchvision_batch(images)
    return Step(detector, lambda: sum(detector(*samples).values())), share


STEPS: Mapping[str, Callable[[str, int, float | None], tuple[Step, float]]] = {
    "seg": segmentor_step,
    "det": detector_step,
    "torchvision": torchvision_step,
}


def _square(config: str, size: object) -> tuple[int, int]:
    """Height and width of the images of a config."""
    height, width = (size, size) if isinstance(size, int) else size or (0, 0)
    if height != width or not height:
        raise ValueError(f"{config}: photos are cut to squares, and its images are {height} x {width}")
    return height, width


def _images(net: APTViT, size: tuple[int, int], batch: int, keep: float | None) -> tuple[Tensor, Tensor, float]:
    """Photos, by which the thresholds are scaled, normalised as ``photos`` does it and as the backbone takes them, and
    the share of tokens that they keep."""
    images = photos(size[0], batch)
    own = normalise(denormalise(images, PixelFormat()), net.pixel_format)
    if keep is not None and net.thresholds:
        scores = [scores_of(net.patches, image[None]) for image in own]
        set_thresholds(net, thresholds_for(scores, net.thresholds, keep))
    return images, own, choose_patches(net.patches, own).tokens_kept
