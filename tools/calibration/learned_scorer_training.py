"""Train a learned scorer: which patches hide something if they are merged, told from pixels."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from apt_dense.patches.scorer_layers import FixedScorer

from calibration.scorer_networks import FirstBlocksNetwork, PatchNetwork
from evidence.labelled_photos import IGNORED
from evidence.photos_in_memory import LabelledSet, epochs_of, random_views

Network = PatchNetwork | FirstBlocksNetwork
_DECAY, _LIGHTER = 0.01, 0.2  # the last: how much lighter or darker photos are made at most


class Fit(NamedTuple):
    """How a scorer is trained.

    Args:
        patch_size: pixels of the smallest patches of the model that it is for.
        scales: coarse scales that it scores.
        size: pixels (H, W) that photos have for the model.
    """

    patch_size: int
    scales: int
    size: tuple[int, int]
    epochs: int = 15
    batch: int = 8


def other_classes(masks: Tensor, size: int) -> Tensor:
    """The share of each complete patch's labelled pixels that are not of its most frequent class.

    Args:
        masks: (B, H, W) integers; ``IGNORED`` is not labelled.
        size: pixels of a patch.

    Returns:
        (B, H // size, W // size) float32 in [0, 1); NaN where nothing is labelled.
    """
    most = total = torch.zeros(1, device=masks.device)
    for label in masks.unique().tolist():
        if label != IGNORED:
            count = F.avg_pool2d((masks == label).float()[:, None], size)[:, 0]
            most, total = torch.maximum(most, count), total + count
    if total.ndim == 1:
        rows, columns = (n // size for n in masks.shape[1:])
        return torch.full((len(masks), rows, columns), torch.nan, device=masks.device)
    return 1 - most / total


class Target(NamedTuple):
    """The loss of information that a scorer is trained to predict for each patch, were it merged.

    Args:
        of: grey levels (B, 3, H, W) and masks (B, H, W) -> a function of a patch's size in pixels, which gives
            (B, H // size, W // size) from 0 to 1, NaN where it is not known.
        name: the sum of it, after "hidden of the".
    """

    of: Callable[[Tensor, Tensor], Callable[[int], Tensor]]
    name: str


LABELS = Target(
    lambda pixels, masks: partial(other_classes, masks), "pixels that merging all of them would give another class"
)


def train_scorer(
    data: LabelledSet, fit: Fit, seed: int = 0, build: Callable[[], Network] = PatchNetwork, target: Target = LABELS,
    in_corners: bool = False,
) -> FixedScorer:  # fmt: skip
    """Train on photos, mirrored, zoomed and lightened at random.

    The network learns the square root of what a patch hides, so that small objects count; its score is the square.

    Args:
        build: makes the network.
        in_corners: whether photos are in corners of squares (``load_objects``).
    """
    torch.manual_seed(seed)
    device, generator = data.photos.device, torch.Generator().manual_seed(seed)
    network = build().to(device)
    optimizer = torch.optim.AdamW(network.parameter_groups(), weight_decay=_DECAY)
    steps = len(data.masks) // fit.batch * fit.epochs
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    order = epochs_of(len(data.masks), fit.batch, fit.epochs, generator)
    bar = tqdm(order, "training the scorer", steps, leave=False)
    for numbers in bar:
        photos, masks = random_views(data, fit.size, numbers, generator, in_corners)
        hidden = target.of(photos, masks)
        lightness = 1 + _LIGHTER * (2 * torch.rand(len(photos), 1, 1, 1, generator=generator) - 1)
        pixels = (photos * lightness.to(device)).clamp(0, 255)
        if in_corners:  # hosts' padding is of one colour
            pixels = torch.where((masks == IGNORED)[:, None], photos, pixels)
        loss = sum(_loss(network, pixels, hidden, fit.patch_size << s) for s in range(1, fit.scales + 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return network.scorer()


def _loss(network: Network, pixels: Tensor, hidden: Callable[[int], Tensor], size: int) -> Tensor:
    expected = hidden(size)
    is_known = ~expected.isnan()
    error = torch.sigmoid(network(pixels, size)) - expected.nan_to_num(0).sqrt()
    return error[is_known].square().sum() / is_known.sum().clamp(min=1)  # photos may be too narrow for a patch


def photo_batches(data: LabelledSet, in_corners: bool) -> Iterator[LabelledSet]:
    """All photos in batches; or one by one without the unlabelled pixels right of and below them, if they are
    ``in_corners`` of squares (``load_objects``)."""
    if not in_corners:
        yield from map(LabelledSet, data.photos.split(8), data.masks.split(8))
        return
    for photo, mask in zip(data.photos, data.masks, strict=True):
        rows, columns = (mask != IGNORED).nonzero().amax(0).add(1).tolist()
        yield LabelledSet(photo[None, :, :rows, :columns], mask[None, :rows, :columns])
