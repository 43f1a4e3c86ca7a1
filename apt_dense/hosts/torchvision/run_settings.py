"""Settings of a detection run of tools/train_det_torchvision.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass

#: What is learned and scored, and the kinds of COCO's scores.
TASKS = {"boxes": ("bbox",), "masks": ("bbox", "segm")}
_LEAST = {
    "size": 32, "channels": 4, "box_features": 1, "proposals": 1, "box_samples": 1, "batch_size": 1, "iterations": 1,
    "weight_decay": 0, "warmup": 0, "clip": 0, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that the course of a training run depends on, apart from the data."""

    task: str = "masks"  # one of TASKS: Mask R-CNN, or Faster R-CNN for data without masks
    model: str = "vit_base"  # one of PRESETS or a timm ViT's name
    pretrained: str | None = None  # a checkpoint file of a ViT, or "timm" for timm's weights
    patch_size: int | None = None  # pixels that patches are resampled to; None for the model's own
    thresholds: tuple[float, ...] = (5.5, 4.0)  # () for the uniform ViT
    drop_padding: bool = True
    size: int = 1024  # pixels of the longer side
    channels: int = 256  # of pyramid and heads
    box_features: int = 1024
    proposals: int = 1000  # per image
    box_samples: int = 512  # of them, per image, for the loss
    checkpoint_blocks: bool = False
    scale_jitter: tuple[float, float] = (0.1, 2.0)  # ViTDet's
    batch_size: int = 4
    iterations: int = 90_000
    lr: float = 1e-4
    lr_decay: float | None = None  # per layer towards the input; None: 0.7 with pretrained weights, otherwise 1
    weight_decay: float = 0.1
    warmup: int = 250  # iterations
    clip: float = 1.0  # norm of the gradients; 0 for any
    amp: bool = False  # bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} must be one of {', '.join(TASKS)}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr", "lr_decay"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")

    def differences(self, other: Settings) -> list[str]:
        """List the settings that differ, as "name: own against other"."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]
