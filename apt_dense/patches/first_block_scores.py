"""Scores from the first blocks of a pretrained ViT: what merging a patch would hide, by labels or by a ViT's features.

A patch of any scale is one patch of the ViT, which sees the image resized until it is as large as that; a small head
turns its token into a score. What blocks learned in pretraining holds beyond a few hundred masks, so that such a scorer
hides fewer objects at the same share of tokens than ``apt_dense.patches.learned_scores`` where photos are unlike those
that it was fitted on (docs/EVIDENCE.md). It costs more: its blocks run for each scale, on a token for each patch.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from apt_dense.patches.scorer_layers import FixedScorer, Shape, Weights, checked, convolve, normalised, sizes_of
from apt_dense.runtime import is_traced, without_autocast

WIDTH = 96  # channels of the head
VIT, HEAD = "vit.", "head."  # prefixes of weights


class FirstBlocks(nn.Module):
    """The first blocks of a timm ViT, for images of any size.

    On the meta device, until weights are assigned: nothing is allocated or drawn.

    Args:
        model: a timm name of a plain ViT.
        blocks: how many.

    Raises:
        ValueError: for a model that timm does not have, that is no plain ViT of square patches, or has fewer blocks.
    """

    def __init__(self, model: str, blocks: int) -> None:
        super().__init__()
        self.model = model
        depth = len(_vit(model).blocks)
        if not 1 <= blocks <= depth:
            raise ValueError(f"the first {blocks} blocks of {model}: expected 1 to {depth}")
        self.vit = _vit(model, depth=blocks)
        #: The sizes of the weights, by name.
        self.sizes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        self.eval()

    @property
    def head_shapes(self) -> tuple[Shape, ...]:
        """The layers that turn features into logits."""
        return Shape(self.vit.embed_dim, WIDTH, 1), Shape(WIDTH, WIDTH, 3), Shape(WIDTH, 1, 1)

    def assign(self, weights: Weights) -> "FirstBlocks":
        """A copy with these weights, of which it takes those that it has; they are not copied."""
        assigned = copy.deepcopy(self).requires_grad_(False)
        assigned.load_state_dict({name: weights[name] for name in self.sizes}, assign=True)
        return assigned

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB grey levels (B, 3, H, W) -> images as the ViT was trained on."""
        mean, std = ([255 * level for level in self.vit.pretrained_cfg[name]] for name in ("mean", "std"))
        return normalised(pixels, mean, std)

    def forward(self, images: Tensor, size: int) -> Tensor:
        """Normalised images (B, 3, H, W) -> the last block's output (B, C, H // size, W // size), standardised: one
        token for each patch of ``size`` pixels."""
        rows, columns = (n // size for n in images.shape[-2:])
        patch, whole = self.vit.patch_embed.patch_size[0], images[..., : rows * size, : columns * size]
        resized = F.interpolate(whole, size=(rows * patch, columns * patch), mode="bilinear", antialias=True)
        (found,) = self.vit.forward_intermediates(resized, indices=1, output_fmt="NCHW", intermediates_only=True)
        return F.layer_norm(found.movedim(1, -1).float(), (found.shape[1],)).movedim(-1, 1)


def _vit(model: str, **options: Any) -> VisionTransformer:
    if not timm.is_model(model):  # a registered name: nothing is downloaded, no folder is read
        raise ValueError(f"timm has no model {model!r}; expected a plain ViT among timm.list_models()")
    no_vit = ValueError(f"{model} is no plain ViT of timm; expected one such as vit_small_patch14_dinov2")
    without_end = {"num_classes": 0, "global_pool": "", "fc_norm": False, "final_norm": False}
    try:
        with torch.device("meta"):
            vit = timm.create_model(model, pretrained=False, dynamic_img_size=True, **without_end, **options)
    except TypeError:
        raise no_vit from None
    except RuntimeError as error:  # an unknown tag
        raise ValueError(f"timm cannot make {model}: {error}") from None
    if type(vit) is not VisionTransformer or type(vit.patch_embed) is not PatchEmbed:
        raise no_vit
    height, width = vit.patch_embed.patch_size
    if height != width:
        raise no_vit
    return vit


class FirstBlockScorer(FixedScorer):
    """The first blocks of a ViT, and a head.

    Blocks attend to all of a batch's padding, and positions are those of its size, as in a plain ViT: scores of an
    image depend on the size to which it is padded, though not on the other images. Under autocast they compute in 16
    bits, as they did while they were fitted, and so do not choose exactly the patches that they choose in float32.

    Args:
        blocks: without weights.
        weights: of the blocks, and of a head of ``head_shapes``.
    """

    KIND = "first_block_scorer"
    follows_autocast = True

    def __init__(self, blocks: FirstBlocks, weights: Weights) -> None:
        super().__init__(weights)
        self.blocks = blocks
        self._blocks_on: dict[torch.device, FirstBlocks] = {}

    @classmethod
    def from_file(
        cls, path: str | Path, note: Mapping[str, Any], weights: Weights, padding: Sequence[float]
    ) -> "FirstBlockScorer":
        """The scorer that a file holds, whatever the colour of a host's padding. Raises ValueError for a model that is
        no plain ViT of timm's, and for weights of other shapes or that are not finite."""
        model = note.get("model")
        count = len({name.split(".")[2] for name in weights if name.startswith(f"{VIT}blocks.")})
        if not isinstance(model, str):
            raise ValueError(f"scorer={str(path)!r} is of the model {model!r}; expected the name of a ViT of timm's")
        try:
            blocks = FirstBlocks(model, count)
        except ValueError as error:
            raise ValueError(f"scorer={str(path)!r}: {error}; recreate it with tools/fit_scorer.py") from None
        return cls(blocks, checked(weights, blocks.sizes | sizes_of(blocks.head_shapes, HEAD), path))

    def note(self) -> dict[str, Any]:
        return {self.KIND: 1, "model": self.blocks.model}

    def normalise(self, pixels: Tensor) -> Tensor:
        return self.blocks.normalise(pixels)

    def logits(self, images: Tensor, size: int) -> Tensor:
        features = self._features(images, size)
        with without_autocast(images):
            return convolve(self.weights_on(images.device), self.blocks.head_shapes, features, HEAD)[:, 0]

    def _features(self, images: Tensor, size: int) -> Tensor:
        weights = self.weights_on(images.device)
        if is_traced():  # a graph can have no module made in it; outside, threads may share none that is called so
            own = {name: weights[name] for name in self.blocks.sizes}
            return torch.func.functional_call(self.blocks, own, (images, size))
        if images.device not in self._blocks_on:
            self._blocks_on[images.device] = self.blocks.assign(weights)
        return self._blocks_on[images.device](images, size)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_blocks_on": {}}
