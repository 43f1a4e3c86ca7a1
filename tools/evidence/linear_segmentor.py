"""A pretrained ViT and a linear head, as evaluations of features use them."""

import torch.nn.functional as F
from torch import Tensor, nn

from apt_dense import APTViT

from evidence.fast_16_bits import in_16_bits
from shared.normalise import normalise


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
        """Logits (B, classes, *size); the model runs in bfloat16 where that is faster."""
        images = normalise(grey_levels, self.backbone.pixel_format)
        with in_16_bits(images.device.type):
            logits = self.head(self.backbone(images)[-1])
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)

    def head(self, feature_map: Tensor) -> Tensor:
        """Features (B, C, h, w) -> logits (B, classes, h, w)."""
        return self.classifier(self.norm(feature_map))
