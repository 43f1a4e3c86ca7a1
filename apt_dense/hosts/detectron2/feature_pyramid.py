"""Detectron2's simple feature pyramid, on the tokens of an adaptive ViT."""

from typing import Any

from detectron2.modeling import Backbone
from detectron2.modeling import SimpleFeaturePyramid as PlainFeaturePyramid
from torch import Tensor

from apt_dense.hosts.detectron2.backbone import APTViT
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.feature_pyramid import check_patch_size, late_scatter, runs_as_written


class SimpleFeaturePyramid(PlainFeaturePyramid):
    """Detectron2's SimpleFeaturePyramid, faster on an :class:`APTViT`, and with a ``size_divisibility`` that works.

    With an :class:`APTViT` as its ``net``, the layers that act on single cells run once per token (see
    ``apt_dense.nn.feature_pyramid.late_scatter``).

    Upstream misspells the key as ``size_divisiblity``, which ImageList ignores. Without ``square_pad``, images whose
    size is not a multiple of the coarsest stride then lose their last rows and columns. Here, both spellings are set.

    With ``square_pad``, the detector pads to that square, and cuts larger images off. The pyramid cannot prevent it;
    use :class:`apt_dense.hosts.detectron2.APTGeneralizedRCNN`, as this project's configs do.
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
            return super().forward(x)
        (rows,), layout = self.net.forward_tokens(x)
        results = [late_scatter(stage, rows, layout) for stage in self.stages]
        if self.top_block is not None:
            results.extend(self.top_block(self._input_of_top_block(results, rows, layout)))
        return dict(zip(self._out_features, results, strict=True))

    def _input_of_top_block(self, results: list[Tensor], rows: Tensor, layout: TokenLayout) -> Tensor:
        if self.top_block.in_feature in self._out_features:
            return results[self._out_features.index(self.top_block.in_feature)]
        return scatter_tokens(rows, layout)  # the backbone's output itself

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The options of ImageList's padding, with both spellings of ``size_divisibility``."""
        return {**super().padding_constraints, "size_divisibility": self._size_divisibility}
