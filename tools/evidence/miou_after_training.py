"""mIoU of a linear head and a pretrained ViT trained together, for one variant and seed."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense import APTViT, load_backbone
from apt_dense.weights.timm_arguments import apt_arguments, timm_model_without_weights

from evidence.labelled_photos import IGNORED, count, scores_from
from evidence.match_token_counts import mean_share, scores_of, thresholds_for
from evidence.model_forms import set_thresholds, with_thresholds
from evidence.photos_in_memory import LabelledSet, epochs_of, random_views, resized_photos
from evidence.training_variants import Variant
from shared.normalise import normalise

_WARM_UP = 0.05  # of the steps


class Plan(NamedTuple):
    """What all variants of a comparison share.

    Args:
        model: a timm name.
        weights: of the backbone, a file; None for timm's, downloaded.
        rate: of learning of the head, in AdamW.
        backbone_rate: of the backbone, as a share of the head's.
        calibrated: photos tested, evenly spread, by which thresholds are chosen at most.
    """

    model: str
    weights: Path | None
    classes: int
    size: tuple[int, int]
    epochs: int
    batch: int = 4
    rate: float = 1e-3
    backbone_rate: float = 0.02
    weight_decay: float = 0.05
    calibrated: int = 100


class LinearSegmentor(nn.Module):
    """A linear classifier of each cell's batch-normalised features, enlarged bilinearly."""

    def __init__(self, backbone: APTViT, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.BatchNorm2d(backbone.embed_dim)
        self.classifier = nn.Conv2d(backbone.embed_dim, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, grey_levels: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, *size); the model runs in bfloat16 on GPUs."""
        images, device = normalise(grey_levels, self.backbone.pixel_format), grey_levels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = self.classifier(self.norm(self.backbone(images)[-1]))
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def build(plan: Plan, variant: Variant) -> LinearSegmentor:
    """Build the model of a variant with the pretrained weights; patches of another size are resampled."""
    options = {"thresholds": (1.0,) if variant.is_adaptive else (), **variant.options}
    resize = "patch_size" in options
    backbone = APTViT.from_timm(plan.model, pretrained=plan.weights is None, **options)
    if plan.weights is not None:
        load_backbone(backbone, plan.weights, resize_patches=resize)
    return LinearSegmentor(backbone, plan.classes)


def choose_thresholds(model: APTViT, variant: Variant, plan: Plan, data: LabelledSet) -> float:
    """Scale the thresholds of an adaptive variant to its share of tokens.

    Returns:
        Tokens per image as a share of those of the uniform model at the plan's size.
    """
    size, base = variant.size or plan.size, plain_patch_size(plan)
    cells = math.prod(n // model.patch_size for n in size) / math.prod(n // base for n in plan.size)
    if not variant.is_adaptive:
        return cells
    ratios = model.thresholds
    some = LabelledSet(*(part[:: max(1, len(part) // plan.calibrated)] for part in data))
    selector = with_thresholds(model.patches, ratios)
    images = (image.cpu() for part in resized_photos(some, size, 8) for image in part.split(1))
    scores = [scores_of(selector, normalise(image, model.pixel_format)) for image in images]
    thresholds = thresholds_for(scores, ratios, variant.tokens / cells)
    set_thresholds(model, thresholds)
    return mean_share(scores, thresholds) * cells


def plain_patch_size(plan: Plan) -> int:
    """Pixels of the pretrained model's patches."""
    return apt_arguments(timm_model_without_weights(plan.model))["patch_size"]


def train(
    model: LinearSegmentor, data: LabelledSet, plan: Plan, variant: Variant, seed: int,
    note: Callable[[Tensor], None],
) -> None:  # fmt: skip
    """Train in place, with AdamW, a linear warm-up and a linear decay to zero; bfloat16 on GPUs.

    Args:
        note: called with the loss of each step, on the device.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = plan.epochs if variant.epochs is None else variant.epochs
    steps = len(data.masks) // plan.batch * epochs
    rate, device = plan.rate * variant.rate, data.photos.device
    head = [*model.norm.parameters(), *model.classifier.parameters()]
    groups = [{"params": head, "lr": rate}, {"params": model.backbone.parameters(), "lr": rate * plan.backbone_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=device.type == "cuda")
    warm_up = max(1, round(steps * _WARM_UP))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    model.train()
    for numbers in tqdm(epochs_of(len(data.masks), plan.batch, epochs, generator), variant.name, steps, leave=False):
        photos, masks = random_views(data, numbers, variant.size or plan.size, generator)
        loss = F.cross_entropy(model(photos, masks.shape[1:]), masks, ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        note(loss.detach())


@torch.inference_mode()
def evaluate(model: LinearSegmentor, data: LabelledSet, size: tuple[int, int], batch: int = 8) -> Mapping[str, float]:
    """mIoU and pixel accuracy in per cent, and tokens of an image on average, with photos resized to ``size``."""
    model.eval()
    classes = model.classifier.out_channels
    confusion, tokens = np.zeros((classes, classes), np.int64), 0
    photos = resized_photos(data, size, batch)
    for grey_levels, masks in tqdm(zip(photos, data.masks.split(batch), strict=True), "testing", leave=False):
        tokens += int((model.backbone.patches.count(normalise(grey_levels, model.backbone.pixel_format))).sum())
        logits = model(grey_levels, masks.shape[1:])
        confusion += count(logits.argmax(1).cpu().numpy(), masks.cpu().numpy(), classes)
    scores = {name: 100 * value for name, value in scores_from(confusion).items()}
    return {**scores, "tokens": tokens / len(data.masks)}


def run(
    plan: Plan, variant: Variant, seed: int, trained: LabelledSet, tested: LabelledSet, start: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train and test one variant with one seed; return its results and its weights on the CPU.

    Args:
        start: weights of the row that this one starts from.
    """
    torch.manual_seed(seed)
    model = build(plan, variant)
    share = choose_thresholds(model.backbone, variant, plan, tested)
    if start is not None:
        _load(model, start)
    model.to(trained.photos.device)
    losses: list[Tensor] = []
    train(model, trained, plan, variant, seed, losses.append)
    results = evaluate(model, tested, variant.size or plan.size)
    loss = torch.stack(losses[-len(losses) // 10 :]).mean().item() if losses else None
    found = {"share": share, "loss": loss, "thresholds": list(model.backbone.thresholds), **results}
    return found, {name: value.cpu() for name, value in model.state_dict().items()}


def _load(model: LinearSegmentor, state: Mapping[str, Tensor]) -> None:
    """Load all weights but those that only adaptive patches have, which may be missing."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if "coarse_embed" not in name]
    if wrong:
        raise ValueError(f"a row starts from a model of another form: {wrong[:3]}")
