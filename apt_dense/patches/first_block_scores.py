"""Scores from the first blocks of a pretrained ViT: how much of a patch shows something else than most of it.

A patch of any scale is one patch of the ViT, which sees the image shrunk until it is as large as that; a small head
turns its token into a score. Pretrained blocks know more than a network that has seen a few hundred masks: in places
that these do not show, such a scorer hides fewer objects at the same share of tokens than
``apt_dense.patches.learned_scores``, for more time: K of a ViT's D blocks, at a quarter of its tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_dense.patches.scorer_layers import Layer, Shape, convolve, layers_from, tensors_of

WIDTH = 96  # channels of the head
_VIT, _HEAD = "vit.", "head."


class FirstBlockScorer:
    """A scorer (``apt_dense.patches.scores.Scorer``) with fixed weights.

    Scores are between 0 and 1: about the share of the patch's pixels that are of another class than most of it. The ViT
    attends to the padding of a batch, as far as it is no part of a patch of the image, as to the image.

    Args:
        model: the timm name of the ViT.
        vit: its first blocks, as :func:`first_blocks` makes them.
        head: weights and biases of the shapes of :func:`head_shapes`.
    """

    KIND = "first_block_scorer"

    def __init__(self, model: str, vit: nn.Module, head: Sequence[Layer]) -> None:
        self.model, self.vit, self.head = model, vit.eval().requires_grad_(False), tuple(head)
        self._on_device = {self.head[0].weight.device: (self.vit, self.head)}

    @classmethod
    def from_file(
        cls, path: str | Path, note: Mapping[str, Any], tensors: Mapping[str, Tensor], padding: Sequence[float]
    ) -> "FirstBlockScorer":
        """The scorer that a file holds, whatever the colour of a host's padding. Raises ValueError for a model that
        timm does not have, and for weights of other shapes or that are not finite."""
        model = note.get("model")
        weights = {name.removeprefix(_VIT): tensor for name, tensor in tensors.items() if name.startswith(_VIT)}
        blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        if not isinstance(model, str) or not blocks:
            raise ValueError(f"scorer={str(path)!r} holds {blocks} blocks of the model {model!r}; expected 1 or more")
        try:
            vit = first_blocks(model, blocks, weights)
        except ValueError as error:
            raise ValueError(f"scorer={str(path)!r}: {error}") from None
        return cls(model, vit, layers_from(tensors, head_shapes(vit), path, _HEAD))

    def content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The note and the tensors of its file."""
        weights = {f"{_VIT}{name}": tensor.cpu().contiguous() for name, tensor in self.vit.state_dict().items()}
        return {self.KIND: 1, "model": self.model}, weights | tensors_of(self.head, _HEAD)

    def __call__(self, pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
        """Score pixels (B, 3, H, W) float32 RGB in [0, 255]: one map (B, H // size, W // size) in (0, 1) per scale."""
        return tuple(self._map(pixels, patch_size * 2**scale) for scale in scales)

    def _map(self, pixels: Tensor, size: int) -> Tensor:
        rows, columns = (n // size for n in pixels.shape[-2:])
        if rows == 0 or columns == 0:
            return pixels.new_zeros(len(pixels), rows, columns)
        vit, head = self._at(pixels.device)
        logits = convolve(head, head_shapes(vit), features(vit, pixels, size))[:, 0]
        return torch.sigmoid(logits).square()

    def _at(self, device: torch.device) -> tuple[nn.Module, Sequence[Layer]]:
        if device not in self._on_device:
            head = tuple(Layer(*(tensor.to(device) for tensor in layer)) for layer in self.head)
            self._on_device[device] = copy.deepcopy(self.vit).to(device), head
        return self._on_device[device]


def head_shapes(vit: nn.Module) -> tuple[Shape, ...]:
    """The layers that turn features into logits."""
    return Shape(vit.embed_dim, WIDTH, 1), Shape(WIDTH, WIDTH, 3), Shape(WIDTH, 1, 1)


def first_blocks(model: str, blocks: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """The first blocks of a timm ViT for images of any size.

    Args:
        weights: a state dict of timm's names; of blocks beyond these and of heads, ignored.

    Raises:
        ValueError: for a model that timm does not have, that is no ViT of square patches, or has fewer blocks, and for
            weights that are not there, of another shape, or not finite.
    """
    vit = _without_weights(model, blocks)
    found = {name: weights[name] for name in vit.state_dict() if name in weights}
    bad = sorted(name for name, tensor in found.items() if not tensor.isfinite().all())
    if bad:
        raise ValueError(f"weights of {model} hold NaN or infinity as {bad[0]}; expected finite ones")
    try:
        vit.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"weights are not those of {model}: {' '.join(str(error).split())[:300]}") from None
    return vit


def _without_weights(model: str, blocks: int) -> nn.Module:
    if not timm.is_model(model):  # a registered name: nothing is downloaded, no folder is read
        raise ValueError(f"timm has no model {model!r}; expected one of timm.list_models('vit_*')")
    no_vit = ValueError(f"{model} is no ViT whose first {blocks} blocks can be taken; try vit_small_patch14_dinov2")
    with torch.random.fork_rng(devices=[]):  # drawing weights that are replaced must not change what is drawn later
        try:
            vit = timm.create_model(model, depth=blocks, num_classes=0, dynamic_img_size=True)
        except (TypeError, RuntimeError):
            raise no_vit from None
    size = getattr(getattr(vit, "patch_embed", None), "patch_size", (0, 1))
    if len(getattr(vit, "blocks", ())) != blocks or size[0] != size[1] or not hasattr(vit, "forward_intermediates"):
        raise no_vit
    return vit


def features(vit: nn.Module, pixels: Tensor, size: int) -> Tensor:
    """RGB grey levels (B, 3, H, W) -> the last block's normalised output (B, C, H // size, W // size), one token for
    each patch of ``size`` pixels."""
    rows, columns = (n // size for n in pixels.shape[-2:])
    patch = vit.patch_embed.patch_size[0]
    mean, std = (pixels.new_tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    whole = (pixels[..., : rows * size, : columns * size] / 255 - mean) / std
    shrunk = F.interpolate(whole, size=(rows * patch, columns * patch), mode="bilinear", antialias=True)
    (found,) = vit.forward_intermediates(shrunk, indices=1, output_fmt="NCHW", intermediates_only=True)
    return F.layer_norm(found.movedim(1, -1).float(), (found.shape[1],)).movedim(-1, 1)
