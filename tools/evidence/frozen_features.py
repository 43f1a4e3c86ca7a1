"""Features of a frozen backbone, made once, and a linear head that is trained on them.

Minutes on a CPU where training the backbone takes hours; what adaptive patches cost without training them.
"""

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense import APTViT
from apt_dense.layout.scatter import scatter_tokens

from evidence.linear_segmentor import LinearSegmentor
from evidence.match_token_counts import timed
from evidence.photos_in_memory import LabelledSet, resized_photos
from evidence.rival_backbones import mean_tokens
from evidence.segmentation_scores import score
from shared.normalise import normalise

_BATCH = 8


class FrozenSet(NamedTuple):
    """Features of V views of N photos: as they are, and mirrored if V is 2.

    Args:
        maps: (V, N, C, h, w) float16.
        masks: (N, H, W) uint8.
        tokens: of a photo as it is, on average over photos and blocks.
        milliseconds: of the backbone for a photo, the median over batches.
    """

    maps: Tensor
    masks: Tensor
    tokens: float
    milliseconds: float

    def views(self, numbers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features of some photos, mirrored half of the time, and their masks (B, H, W) int64."""
        mirrored = (torch.rand(len(numbers), generator=generator) < 0.5).long()
        masks = self.masks[numbers].long()
        masks = torch.where(mirrored.bool().view(-1, 1, 1).to(masks.device), masks.flip(-1), masks)
        return self.maps[mirrored, numbers].float(), masks


@torch.inference_mode()
def features_of(net: APTViT, data: LabelledSet, size: tuple[int, int], mirrored: bool) -> FrozenSet:
    """Run a backbone over all photos, resized to ``size``, in bfloat16."""
    net.eval()
    views = []
    for flip in (False, True)[: 1 + mirrored]:
        photos = tqdm(resized_photos(data, size, _BATCH), "features", -(-len(data.masks) // _BATCH), leave=False)
        found = [_features(net, normalise(part.flip(-1) if flip else part, net.pixel_format)) for part in photos]
        views.append([torch.cat(parts) for parts in zip(*found, strict=True)])
    maps, tokens, seconds = (torch.stack(parts) for parts in zip(*views, strict=True))
    return FrozenSet(maps, data.masks, tokens[0].double().mean().item(), 1000 * seconds.median().item())


def _features(net: APTViT, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of normalised images (B, C, h, w) float16, tokens (B,), seconds (B,)."""
    maps, seconds = timed(lambda: feature_map(net, images))
    return maps.to(images.device), mean_tokens(net, images), torch.full((len(images),), seconds / len(images))


def feature_map(net: APTViT, images: Tensor) -> Tensor:
    """The last features of normalised images, computed in bfloat16: (B, C, h, w) float16."""
    with torch.autocast(images.device.type, torch.bfloat16):
        rows, layout = net.forward_tokens(images)
        return scatter_tokens(rows[-1], layout).half()


Features = TypeVar("Features")


class LastFeatures(Generic[Features]):
    """Keeps the features of the last variant, which all its seeds share: of photos to train on, and to test on."""

    def __init__(self) -> None:
        self._key: object = None
        self._sets: tuple[Features, ...] = ()

    def get(self, key: object, make: Callable[[], tuple[Features, ...]]) -> tuple[Features, ...]:
        """Those of a variant, made if others are kept."""
        if self._key is None or self._key != key:
            self._key, self._sets = None, ()  # let go before the next are made
            self._key, self._sets = key, make()
        return self._sets


class FrozenSegmentor(nn.Module):
    """A segmentor from its backbone's features on."""

    def __init__(self, segmentor: LinearSegmentor) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, *size)."""
        return F.interpolate(self.segmentor.head(maps), size=size, mode="bilinear", align_corners=False)


@torch.inference_mode()
def evaluate_frozen(model: FrozenSegmentor, data: FrozenSet, scale_maps: Tensor | None = None) -> dict[str, float]:
    """Scores, by the patches of ``scale_maps`` if there are any (``score``); tokens of an image, and
    milliseconds of the backbone."""
    model.eval()
    predictions = ((model(maps.float(), masks.shape[1:]).argmax(1), masks) for maps, masks in _batches(data))
    scores = score(predictions, model.segmentor.classifier.out_channels, scale_maps)
    return {**scores, "tokens": data.tokens, "backbone ms": data.milliseconds}


def _batches(data: FrozenSet) -> Iterator[tuple[Tensor, Tensor]]:
    parts = (part.split(_BATCH) for part in (data.maps[0], data.masks))
    return tqdm(zip(*parts, strict=True), "testing", -(-len(data.masks) // _BATCH), leave=False)
