"""mIoU of a linear head and a pretrained ViT trained together, for one variant and seed."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense import APTViT, load_backbone
from apt_dense.weights.parameter_rules import is_new
from apt_dense.weights.timm_arguments import apt_arguments, timm_model_without_weights

from evidence.frozen_features import FrozenSegmentor, FrozenSet, LastFeatures, evaluate_frozen, features_of
from evidence.labelled_photos import IGNORED
from evidence.linear_segmentor import LinearSegmentor
from evidence.match_token_counts import mean_share, scores_of, thresholds_for, timed
from evidence.model_forms import set_thresholds, with_thresholds
from evidence.photos_in_memory import LabelledSet, epochs_of, random_views, resized_photos
from evidence.rival_backbones import RANDOM, RIVALS, RivalViT, mean_tokens, random_scores
from evidence.segmentation_scores import score
from evidence.training_variants import Variant
from shared.normalise import normalise

_WARM_UP = 0.05  # of the steps
Views = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Plan(NamedTuple):
    """What all variants of a comparison share.

    Args:
        model: a timm name.
        weights: of the backbone, a file; None for timm's, downloaded.
        rate: of learning of the head, in AdamW.
        new_rate: of what only APT has, which starts neutral, as a share of that.
        backbone_rate: of all else in the backbone, as a share of that; 0 leaves it frozen, and its features are made
            once.
        calibrated: photos tested, evenly spread, by which thresholds are chosen at most.
    """

    model: str
    weights: Path | None
    classes: int
    size: tuple[int, int]
    epochs: int
    batch: int = 4
    rate: float = 1e-3
    new_rate: float = 0.1
    backbone_rate: float = 0.02
    weight_decay: float = 0.05
    calibrated: int = 100


def build(plan: Plan, variant: Variant) -> LinearSegmentor:
    """Build the model of a variant with the pretrained weights; patches of another size are resampled."""
    options = {"thresholds": (1.0,) if variant.is_adaptive else (), **variant.options}
    if variant.rival == RANDOM:
        options["scorer"] = random_scores
    resize = "patch_size" in options
    kind = RIVALS.get(variant.rival, APTViT)
    backbone = kind.from_timm(plan.model, pretrained=plan.weights is None, **options)
    if plan.weights is not None:
        load_backbone(backbone, plan.weights, resize_patches=resize)
    if isinstance(backbone, RivalViT):
        backbone.keep(variant.tokens / cells_of(backbone, variant, plan))
    return LinearSegmentor(backbone, plan.classes)


def cells_of(model: APTViT, variant: Variant, plan: Plan) -> float:
    """Cells of an image as a share of those of the uniform model at the plan's size."""
    size, base = variant.size or plan.size, plain_patch_size(plan)
    return math.prod(n // model.patch_size for n in size) / math.prod(n // base for n in plan.size)


def choose_thresholds(model: APTViT, variant: Variant, plan: Plan, data: LabelledSet) -> float:
    """Scale the thresholds of an adaptive variant to its share of tokens.

    Returns:
        Tokens per image as a share of those of the uniform model at the plan's size.
    """
    cells = cells_of(model, variant, plan)
    if not variant.is_adaptive:
        return cells * getattr(model, "share", 1.0)
    ratios = model.thresholds
    some = LabelledSet(*(part[:: max(1, len(part) // plan.calibrated)] for part in data))
    selector = with_thresholds(model.patches, ratios)
    photos = resized_photos(some, variant.size or plan.size, 8)
    images = (image.cpu() for part in photos for image in part.split(1))
    scores = [scores_of(selector, normalise(image, model.pixel_format)) for image in images]
    thresholds = thresholds_for(scores, ratios, variant.tokens / cells)
    set_thresholds(model, thresholds)
    return mean_share(scores, thresholds) * cells


def plain_patch_size(plan: Plan) -> int:
    """Pixels of the pretrained model's patches."""
    return apt_arguments(timm_model_without_weights(plan.model))["patch_size"]


def train(
    model: nn.Module, views: Views, masks: Tensor, plan: Plan, variant: Variant, seed: int,
    note: Callable[[Tensor], None],
) -> float | None:  # fmt: skip
    """Train in place, with AdamW, a linear warm-up and a linear decay to zero; bfloat16 on GPUs.

    Args:
        views: numbers of photos -> the model's input, and masks (B, h, w).
        masks: of all photos.
        note: called with the loss of each step, on the device.

    Returns:
        Seconds of a step; None if there were none.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = plan.epochs if variant.epochs is None else variant.epochs
    count, rate = len(masks), plan.rate * variant.rate
    steps = count // plan.batch * epochs
    groups = parameter_groups(model, rate, rate * plan.new_rate, rate * plan.backbone_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=masks.is_cuda)
    warm_up = max(1, round(steps * _WARM_UP))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    model.train()
    start = time.perf_counter()
    for numbers in tqdm(epochs_of(count, plan.batch, epochs, generator), variant.name, steps, leave=False):
        inputs, wanted = views(numbers, generator)
        loss = F.cross_entropy(model(inputs, wanted.shape[1:]), wanted, ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        note(loss.detach())
    if masks.is_cuda:
        torch.cuda.synchronize(masks.device)
    return (time.perf_counter() - start) / steps if steps else None


def parameter_groups(model: nn.Module, rate: float, new_rate: float, backbone_rate: float) -> list[dict[str, Any]]:
    """Parameters of the head, those that only APT has, and all else in the backbone."""
    groups: tuple[list, list, list] = [], [], []
    for name, parameter in model.named_parameters():
        groups[0 if "backbone." not in name else 1 if is_new(name) else 2].append(parameter)
    rates = rate, new_rate, backbone_rate
    return [{"params": group, "lr": each} for group, each in zip(groups, rates, strict=True) if group]


class Sets(NamedTuple):
    """The training set and the test set.

    Args:
        scale_maps: (N, h, w) of the photos tested, by which all rows' scores are grouped (``score``).
    """

    trained: LabelledSet
    tested: LabelledSet
    scale_maps: Tensor | None = None


@torch.inference_mode()
def evaluate(
    model: LinearSegmentor, data: LabelledSet, size: tuple[int, int], scale_maps: Tensor | None = None, batch: int = 8
) -> Mapping[str, float]:
    """Scores of photos resized to ``size`` (``score``), and tokens and milliseconds of one on average."""
    model.eval()
    net, tokens, seconds = model.backbone, [], []

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        batches = zip(resized_photos(data, size, batch), data.masks.split(batch), strict=True)
        for grey_levels, masks in tqdm(batches, "testing", leave=False):
            found, took = timed(lambda photos=grey_levels, size=masks.shape[1:]: model(photos, size).argmax(1))
            tokens.append(mean_tokens(net, normalise(grey_levels, net.pixel_format)))
            seconds.append(took / len(found))
            yield found, masks

    scores = score(predictions(), model.classifier.out_channels, scale_maps)
    return {**scores, "tokens": torch.cat(tokens).double().mean().item(), "ms": 1000 * statistics.median(seconds)}


def scale_maps_of(plan: Plan, variant: Variant, data: LabelledSet) -> Tensor:
    """Which patches a variant cuts photos into, (N, h, w)."""
    net = build(plan, variant).backbone
    choose_thresholds(net, variant, plan, data)
    batches = resized_photos(data, variant.size or plan.size, 8)
    return torch.cat([net.partition(normalise(part.cpu(), net.pixel_format)) for part in batches])


def run(
    plan: Plan, variant: Variant, seed: int, sets: Sets, start: Mapping[str, Any] | None,
    features: LastFeatures | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Train and test one variant with one seed; return its results and its weights on the CPU.

    Args:
        start: weights of the row that this one starts from.
        features: those of a frozen backbone, for the next seed.
    """
    torch.manual_seed(seed)
    model = build(plan, variant)
    share = choose_thresholds(model.backbone, variant, plan, sets.tested)
    if start is not None:
        _load(model, start)
    model.to(sets.trained.photos.device)
    losses: list[Tensor] = []
    if plan.backbone_rate:
        size = variant.size or plan.size
        views = partial(random_views, sets.trained, size)
        seconds = train(model, views, sets.trained.masks, plan, variant, seed, losses.append)
        results = {**evaluate(model, sets.tested, size, sets.scale_maps), "step ms": seconds and 1000 * seconds}
    else:
        same = plan, variant.size, variant.tokens, variant.rival, variant.options
        frozen = (features or LastFeatures()).get(same, lambda: _features(model, plan, variant, sets))
        results = _train_on_features(model, plan, variant, seed, frozen, sets.scale_maps, losses.append)
    loss = torch.stack(losses[-len(losses) // 10 :]).mean().item() if losses else None
    found = {"share": share, "loss": loss, "thresholds": list(model.backbone.thresholds), **results}
    return found, {name: value.cpu() for name, value in model.state_dict().items()}


def _features(model: LinearSegmentor, plan: Plan, variant: Variant, sets: Sets) -> tuple[FrozenSet, FrozenSet]:
    size = variant.size or plan.size
    return features_of(model.backbone, sets.trained, size, True), features_of(model.backbone, sets.tested, size, False)


def _train_on_features(
    model: LinearSegmentor, plan: Plan, variant: Variant, seed: int, sets: tuple[FrozenSet, FrozenSet],
    scale_maps: Tensor | None, note: Callable[[Tensor], None],
) -> Mapping[str, float]:  # fmt: skip
    """Train and test the head."""
    model.backbone.requires_grad_(False)
    frozen, (trained, tested) = FrozenSegmentor(model), sets
    train(frozen, trained.views, trained.masks, plan, variant, seed, note)
    return evaluate_frozen(frozen, tested, scale_maps)


def _load(model: LinearSegmentor, state: Mapping[str, Tensor]) -> None:
    """Load all weights but those that only adaptive patches have, which may be missing."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if "coarse_embed" not in name]
    if wrong:
        raise ValueError(f"a row starts from a model of another form: {wrong[:3]}")
