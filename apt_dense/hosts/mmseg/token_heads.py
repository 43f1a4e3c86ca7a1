"""MMSegmentation's own necks and heads on tokens: pointwise layers run once per token, and are scattered afterwards.

``APTEncoderDecoder`` has this built in. Values, gradients, running statistics and names of weights are those of
``EncoderDecoder``; only the order of layers and scatter differs.
"""

from typing import Any

import torch.distributed as dist
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.models.necks import Feature2Pyramid
from torch import Tensor, nn

from apt_dense import vit
from apt_dense.hosts.mmseg.uper_head import APTUPerHead
from apt_dense.nn.feature_pyramid import runs_as_written
from apt_dense.nn.unscattered_maps import TokenMap
from apt_dense.runtime import is_traced

# Known to pass their inputs to layers and torch functions alone. Others get scattered maps.
_NECKS, _HEADS = (Feature2Pyramid,), (FCNHead, UPerHead, APTUPerHead)


class TokenHeads:
    """A mixin of segmentors that hands the backbone's tokens to neck and heads where they know what to do with them."""

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor | TokenMap, ...]:
        """Features of normalised images (B, 3, H, W) for the heads."""
        if not self._takes_tokens():
            return super().extract_feat(inputs)
        outputs, layout = self.backbone.forward_tokens(inputs)
        maps = tuple(TokenMap.from_rows(rows, layout) for rows in outputs)
        return self.neck(maps) if self.with_neck else maps

    def _forward(self, *args: Any, **options: Any) -> Any:
        """The head's output as a tensor, also where the head consists of pointwise layers only."""
        output = super()._forward(*args, **options)
        return output.dense() if isinstance(output, TokenMap) else output

    def _takes_tokens(self) -> bool:
        net = self.backbone
        if not isinstance(net, vit.APTViT) or not runs_as_written(net) or is_traced():
            return False
        parts = [self.decode_head, *_listed(getattr(self, "auxiliary_head", None))]
        known = all(type(head) in _HEADS for head in parts) and all(
            type(neck) in _NECKS for neck in _listed(getattr(self, "neck", None))
        )
        saves = bool(net.thresholds) or net.drop_padding
        return known and saves and not _synchronises(self)


def _listed(part: nn.Module | None) -> list[nn.Module]:
    """A part of a segmentor, of which there may be none, one, or several in a ModuleList."""
    return [] if part is None else list(part) if isinstance(part, nn.ModuleList) else [part]


def _synchronises(model: nn.Module) -> bool:
    """Check whether batch norms exchange statistics between processes, in an operation that wants plain tensors."""
    several = model.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
