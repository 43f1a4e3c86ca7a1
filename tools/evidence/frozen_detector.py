"""A detector whose backbone is frozen: its features, made once, and the heads that are trained on them."""

import statistics
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from tqdm import tqdm

from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid

from evidence.detection_photos import SizedPhotos
from evidence.frozen_features import feature_map
from evidence.match_token_counts import timed
from evidence.rival_backbones import mean_tokens


class DetectorFeatures(NamedTuple):
    """Features of V views of N photos: as they are, and mirrored if V is 2.

    Args:
        maps: (V, N, C, h, w) float16, zeros right of and below a photo.
        sizes: (height, width) of the photos, in pixels as the backbone sees them.
        tokens: of a photo as it is, on average over photos and blocks.
        milliseconds: of the backbone for a photo, the median.
    """

    maps: Tensor
    sizes: Sequence[tuple[int, int]]
    tokens: float
    milliseconds: float


@torch.inference_mode()
def detector_features(model: FasterRCNN, data: SizedPhotos, mirrored: bool) -> DetectorFeatures:
    """Run the backbone over all photos, one by one and in bfloat16."""
    model.eval()
    net, device = model.backbone.net, next(model.parameters()).device
    maps, sizes, tokens, seconds = [], [], [], []
    for flip in (False, True)[: 1 + mirrored]:
        for number in tqdm(range(len(data.photos)), "features", leave=False):
            batch, _ = model.transform([data.image(number, flip).to(device)])
            found, took = timed(lambda images=batch.tensors: feature_map(net, images))
            maps.append(found[0].to(device))
            seconds.append(took)
            if not flip:
                sizes += batch.image_sizes
                tokens.append(mean_tokens(net, batch.tensors).item())
    maps = _of_one_size(maps).unflatten(0, (1 + mirrored, -1))
    return DetectorFeatures(maps, sizes, statistics.fmean(tokens), 1000 * statistics.median(seconds))


def _of_one_size(maps: Sequence[Tensor]) -> Tensor:
    """Pad maps (C, h, w) with zeros at the right and bottom, and stack them."""
    rows, columns = (max(each.shape[dim] for each in maps) for dim in (1, 2))
    return torch.stack([F.pad(each, (0, columns - each.shape[2], 0, rows - each.shape[1])) for each in maps])


class DetectorOnFeatures(nn.Module):
    """A detector from its backbone's features on."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self, maps: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, and otherwise detections in pixels as the backbone saw the photos.

        Args:
            maps: (B, C, h, w), of which as much is used as a batch of these photos would have.
            sizes: (height, width) of the photos.
        """
        body = self.detector.backbone
        divisor = self.detector.transform.size_divisible
        side = [-(-max(lengths) // divisor) * divisor for lengths in zip(*sizes, strict=True)]
        rows, columns = (pixels // body.net.patch_size for pixels in side)
        levels = SimpleFeaturePyramid.forward(body, maps[..., :rows, :columns])
        levels = OrderedDict(zip(body.levels, levels, strict=True))
        images = ImageList(maps.new_empty(1).expand(len(maps), 3, *side), sizes)
        proposals, losses = self.detector.rpn(images, levels, targets)
        found, box_losses = self.detector.roi_heads(levels, proposals, sizes, targets)
        return {**losses, **box_losses} if self.training else found
