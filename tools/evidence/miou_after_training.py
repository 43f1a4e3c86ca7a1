"""mIoU of a linear head and a pretrained ViT trained together, for one variant and seed."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense import APTViT

from evidence.frozen_features import FrozenSegmentor, FrozenSet, LastFeatures, evaluate_frozen, features_of
from evidence.labelled_photos import IGNORED, Labelled
from evidence.linear_segmentor import LinearSegmentor
from evidence.match_token_counts import timed
from evidence.model_forms import set_thresholds
from evidence.photos_in_memory import LabelledSet, load_set, random_views, resized_photos
from evidence.rival_backbones import mean_tokens
from evidence.segmentation_scores import score
from evidence.training_loop import Loss, load_start, on_cpu, repeated_step, summary, train
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan, backbone_key, build_backbone, choose_thresholds
from shared.normalise import normalise
from shared.photo_files import evenly_spread

_TIMED = 16  # photos of a forward pass that is timed
Views = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def build(plan: Plan, variant: Variant) -> LinearSegmentor:
    """Build the model of a variant with the pretrained weights."""
    return LinearSegmentor(build_backbone(plan, variant), plan.classes)


def images_to_calibrate(net: APTViT, plan: Plan, variant: Variant, data: LabelledSet) -> Iterator[Tensor]:
    """Some photos, as ``choose_thresholds`` takes them."""
    some = LabelledSet(*(part[:: max(1, len(part) // plan.calibrated)] for part in data))
    for photos in resized_photos(some, variant.size or plan.size, 8):
        yield from (normalise(image.cpu(), net.pixel_format) for image in photos.split(1))


def loss_of_views(model: nn.Module, views: Views, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of random views of some photos."""
    inputs, wanted = views(numbers, generator)
    return F.cross_entropy(model(inputs, wanted.shape[1:]), wanted, ignore_index=IGNORED)


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
    net = build_backbone(plan, variant)
    choose_thresholds(net, variant, plan, images_to_calibrate(net, plan, variant, data))
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
    net = model.backbone
    share = choose_thresholds(net, variant, plan, images_to_calibrate(net, plan, variant, sets.tested))
    if start is not None:
        load_start(model, start)
    model.to(sets.trained.photos.device)
    losses: list[Tensor] = []
    if plan.backbone_rate:
        size = variant.size or plan.size
        loss_of = _loss_of(model, sets.trained, size)
        seconds = train(model, net, loss_of, len(sets.trained.masks), plan, variant, seed, losses.append)
        results = {**evaluate(model, sets.tested, size, sets.scale_maps), "step ms": seconds and 1000 * seconds}
    else:
        key = backbone_key(plan, variant)
        frozen = (features or LastFeatures()).get(key, lambda: _features(model, plan, variant, sets))
        results = _train_on_features(model, plan, variant, seed, frozen, sets.scale_maps, losses.append)
    return {**summary(net, share, losses), **results}, on_cpu(model)


def _loss_of(model: LinearSegmentor, data: LabelledSet, size: tuple[int, int]) -> Loss:
    return partial(loss_of_views, model, partial(random_views, data, size))


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
    loss_of = partial(loss_of_views, frozen, trained.views)
    train(frozen, model.backbone, loss_of, len(trained.masks), plan, variant, seed, note)
    return evaluate_frozen(frozen, tested, scale_maps)


class SegmentationTask:
    """Trainings on photos and masks, scored by mIoU.

    Args:
        trained, tested: photos with their masks.
        zero_is_void: whether label 0 is not counted.
        groups: the variant by whose patches scores are grouped.
    """

    metric = "mIoU"

    def __init__(
        self, trained: Sequence[Labelled], tested: Sequence[Labelled], zero_is_void: bool, device: torch.device,
        groups: Variant | None = None,
    ) -> None:  # fmt: skip
        self.files = {
            name: [path for pair in pairs for path in pair]
            for name, pairs in (("trained", trained), ("tested", tested))
        }
        self._pairs, self._device, self._zero_is_void, self._groups = (trained, tested), device, zero_is_void, groups
        self._sets: Sets | None = None
        self._features = LastFeatures()

    def run(
        self, plan: Plan, variant: Variant, seed: int, start: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :func:`run`; photos are read once. Raises ValueError, OSError."""
        self._sets = self._sets or self._load(plan)
        return run(plan, variant, seed, self._sets, start, self._features)

    def forward(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> Callable[[], int]:
        """See :class:`Task`; some photos tested, in batches of 8, to classes at the masks' size."""
        model, tested = self._untrained(plan, variant, thresholds).eval(), self._sets.tested
        some = LabelledSet(*(part[list(evenly_spread(range(len(part)), _TIMED))] for part in tested))
        batches = list(resized_photos(some, variant.size or plan.size, 8))

        @torch.inference_mode()
        def run_all() -> int:
            return sum(len(model(photos, tested.masks.shape[1:]).argmax(1)) for photos in batches)

        return run_all

    def step(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> Callable[[], int]:
        """See :class:`Task`."""
        model, trained = self._untrained(plan, variant, thresholds), self._sets.trained
        loss_of = _loss_of(model, trained, variant.size or plan.size)
        return repeated_step(model, model.backbone, loss_of, len(trained.masks), plan)

    def _untrained(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> LinearSegmentor:
        self._sets = self._sets or self._load(plan)
        model = build(plan, variant).to(self._device)
        if variant.is_adaptive:
            set_thresholds(model.backbone, tuple(thresholds))
        return model

    def _load(self, plan: Plan) -> Sets:
        sets = Sets(*(load_set(pairs, self._zero_is_void, plan.classes, self._device) for pairs in self._pairs))
        if self._groups is None:
            return sets
        return sets._replace(scale_maps=scale_maps_of(plan, self._groups, sets.tested))
