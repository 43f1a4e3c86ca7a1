"""Settings of a detection run of tools/train_det_torchvision.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from apt_dense.nn.feature_pyramid import SCALE_FACTORS
from apt_dense.option_checks import (
    Options,
    choice,
    each,
    flag,
    number,
    option,
    optional,
    share,
    text,
    thresholds,
    whole,
)
from apt_dense.patches.schedule import PatchSchedule

#: What is learned and scored, and the kinds of COCO's scores.
TASKS = {"boxes": ("bbox",), "masks": ("bbox", "segm")}


def _factors(name: str, value: object) -> tuple[float, float]:
    """A lowest and a highest factor."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be a lowest and a highest factor")
    low, high = (number(above=0)(name, each) for each in value)
    if low > high:
        raise ValueError(f"{name}={value!r} must be a lowest and a highest factor")
    return low, high


def _span(name: str, value: object) -> tuple[float, float]:
    """The begin and the end of a schedule."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be two shares of the run, its begin and its end")
    try:
        schedule = PatchSchedule(*value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}={value!r}: {error}") from None
    return float(schedule.begin), float(schedule.end)


@dataclass(frozen=True)
class Settings(Options):
    """Everything that the course of a training run depends on, apart from the data.

    Raises:
        ValueError, TypeError: for a value of another type or out of range, naming it; checkpoints hold any.
    """

    task: str = option("masks", choice(*TASKS))  # Mask R-CNN, or Faster R-CNN for data without masks
    model: str = option("vit_base", text)  # one of PRESETS or a timm ViT's name
    pretrained: str | None = option(None, optional(text))  # a checkpoint file of a ViT, or "timm" for timm's weights
    patch_size: int | None = option(None, optional(whole(1)))  # pixels that patches are resampled to; None: the model's
    thresholds: tuple[float, ...] = option((5.5, 4.0), thresholds)  # () for the uniform ViT
    scorer: str = option("entropy", text)  # or the file of a learned one
    # Shares of the run between which thresholds rise from 0 to those; None: they are the same all along.
    anneal: tuple[float, float] | None = option(None, optional(_span))
    expected_tokens: float | None = option(None, optional(share))  # warn where training keeps another share of tokens
    drop_padding: bool = option(True, flag)
    size: int = option(1024, whole(32))  # pixels of the longer side
    channels: int = option(256, whole(4))  # of pyramid and heads
    # Sizes of the pyramid's levels relative to the ViT's feature map. With patches of 8 pixels, (2.0, 1.0, 0.5) has the
    # strides that the default has with 16.
    scale_factors: tuple[float, ...] = option(SCALE_FACTORS, each(number(above=0)))
    box_features: int = option(1024, whole(1))
    proposals: int = option(1000, whole(1))  # per image
    box_samples: int = option(512, whole(1))  # of them, per image, for the loss
    checkpoint_blocks: bool = option(False, flag)
    scale_jitter: tuple[float, float] = option((0.1, 2.0), _factors)  # ViTDet's
    batch_size: int = option(4, whole(1))
    iterations: int = option(90_000, whole(1))
    lr: float = option(1e-4, number(above=0))
    # Per layer towards the input; None: 0.7 with pretrained weights, otherwise 1.
    lr_decay: float | None = option(None, optional(number(above=0)))
    weight_decay: float = option(0.1, number(least=0))
    warmup: int = option(250, whole(0))  # iterations
    clip: float = option(1.0, number(least=0))  # norm of the gradients; 0 for any
    amp: bool = option(False, flag)  # bfloat16
    seed: int = option(0, whole(0, 2**63 - 1))  # the largest that torch takes

    def differences(self, other: Settings) -> list[str]:
        """List the settings that differ, as "name: own against other"."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]
