"""Detectron2's simple feature pyramid, on the tokens of an adaptive ViT."""

from collections.abc import Callable
from typing import Any

from detectron2.modeling import Backbone
from detectron2.modeling import SimpleFeaturePyramid as PlainFeaturePyramid
from torch import Tensor

from apt_dense.hosts.detectron2.backbone import APTViT
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.nn.feature_pyramid import check_patch_size, late_scatter, runs_as_written
from apt_dense.ops.cpu_layers import call_on_map


class SimpleFeaturePyramid(PlainFeaturePyramid):
    """Detectron2's SimpleFeaturePyramid, faster on an :class:`APTViT`, and with a ``size_divisibility`` that works.

    With an :class:`APTViT` as its ``net``, the layers that act on single cells run once per token (see
    ``apt_dense.nn.feature_pyramid.late_scatter``).

    Upstream misspells the key as ``size_divisiblity``, which ImageList ignores. Without ``square_pad``, images whose
    size is not a multiple of the coarsest stride then lose their last rows and columns. Here, both spellings are set.

    With ``square_pad``, the detector pads to that square, and cuts larger images off. The pyramid cannot prevent it;
    use :class:`apt_dense.hosts.detectron2.APTGeneralizedRCNN`, as this project's configs do.

    On CPUs in 16 bits, PyTorch's convolutions are wrong on some maps of one row or column. With any ``net``, the layers
    of this pyramid are right there; upstream's are not.
    """

    def __init__(self, net: Backbone, *args: Any, **options: Any) -> None:
        if isinstance(net, APTViT):
            check_patch_size(net.patch_size)
        super().__init__(net, *args, **options)

    @property
    def size_divisibility(self) -> int:
        """Heights and widths are padded to a multiple of this number of pixels."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the levels of normalised images (B, 3, H, W): {"p2": (B, C, H / 4, W / 4), ...}, with upstream's
        values."""
        if not isinstance(self.net, APTViT) or not runs_as_written(self.net):
            features = self.net(x)
            results = [call_on_map(stage, features[self.in_feature]) for stage in self.stages]
            return self._with_top_block(results, features.get)
        (rows,), layout = self.net.forward_tokens(x)
        results = [late_scatter(stage, rows, layout) for stage in self.stages]
        return self._with_top_block(results, lambda name: scatter_tokens(rows, layout))

    def _with_top_block(self, results: list[Tensor], feature: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Name the levels, with those that the top block makes of one of them or of a feature of the backbone."""
        if self.top_block is not None:
            name = self.top_block.in_feature
            is_level = name in self._out_features
            results.extend(self.top_block(results[self._out_features.index(name)] if is_level else feature(name)))
        return dict(zip(self._out_features, results, strict=True))

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The options of ImageList's padding, with both spellings of ``size_divisibility``."""
        return {**super().padding_constraints, "size_divisibility": self._size_divisibility}
