"""The variance of a trained ViT's features within a patch: a target for learned scorers that needs no labels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import APTViT
from apt_dense.hosts.load_trained import load_trained
from apt_dense.weights.arguments_in_own_metadata import noted_options
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.find_backbone_weights import innermost

from calibration.learned_scorer_training import Fit, Target
from calibration.scorer_networks import trained_vit
from evidence.fast_16_bits import in_16_bits
from evidence.labelled_photos import IGNORED
from evidence.match_token_counts import model_input
from evidence.model_forms import set_thresholds

#: Options that neither a timm name nor the shapes of weights tell, taken from the notes of our own files.
_NOTED = (
    "pixel_mean", "pixel_std", "channel_order", "window_size", "window_block_indexes", "drop_padding",
    "partial_patches", "pos_antialias",
)  # fmt: skip


def variance_within(features: Tensor, is_known: Tensor, patch_size: int, size: int) -> Tensor:
    """The variance of the smallest patches' features within each complete patch that would replace them.

    Args:
        features: (B, C, h, w), of length 1 along C.
        is_known: (B, H, W) booleans.
        patch_size: pixels of the smallest patches; h = H // patch_size.
        size: pixels of the patch.

    Returns:
        (B, H // size, W // size): 1 less the squared length of their mean, from 0 to 1; NaN where a pixel is not known.
    """
    variance = 1 - F.avg_pool2d(features, size // patch_size).square().sum(1)
    unknown = F.max_pool2d((~is_known).float(), size)
    return variance.clamp(0, 1).where(unknown == 0, torch.nan)


def feature_variance(backbone: APTViT, patch_size: int) -> Target:
    """The variance of a trained model's last features, each standardised and of length 1.

    Args:
        backbone: in eval mode, all of whose patches are of ``patch_size``.
    """

    def target(pixels: Tensor, masks: Tensor) -> Callable[[int], Tensor]:
        rows, columns = (n // patch_size * patch_size for n in pixels.shape[-2:])
        is_known = masks != IGNORED
        images = model_input(pixels, backbone) * is_known[:, None]  # zeros, as hosts pad
        with torch.no_grad(), in_16_bits(pixels.device.type):
            # Not backbone(...), which gives a dictionary in Detectron2.
            features = APTViT.forward(backbone, images[..., :rows, :columns])[-1]
        standardised = F.layer_norm(features.float().movedim(1, -1), features.shape[1:2])
        unit = F.normalize(standardised, dim=-1).movedim(-1, 1)
        return partial(variance_within, unit, is_known, patch_size)

    return Target(target, "variance of features within them all")


def uniform_model(model: str, weights: Path, fit: Fit) -> APTViT:
    """A trained timm model with patches of one size, whose output is its last block's.

    Args:
        model: a timm name.
        weights: of its training for a task, a file that ``load_backbone`` reads.

    Raises:
        ValueError, OSError: for a model or a file that ``APTViT.from_timm`` or ``load_backbone`` refuses, such as one
            with patches of another size.
    """
    content = read_checkpoint(weights)
    noted = noted_options(innermost(content), has_coarse=False)
    options = {name: noted[name] for name in _NOTED if name in noted}
    role = f"{weights}, as {model} with --patch-size {fit.patch_size}"
    backbone = trained_vit(model, content, role, patch_size=fit.patch_size, img_size=fit.size, **options)
    return backbone.eval().requires_grad_(False)


def uniform_backbone(run: Path, config: Path | None, fit: Fit) -> APTViT:
    """The backbone of a segmentor or detector that was trained, with patches of one size.

    Args:
        run: its folder or a checkpoint, as ``config`` an argument of ``load_trained``.

    Raises:
        ValueError, OSError, ImportError: as ``load_trained``; ValueError if its patches are of another size.
    """
    try:
        backbone = load_trained(run, config, device="cpu").backbone
    except ValueError as error:
        raise ValueError(f"{error}. If these are weights alone: --features --model NAME --weights FILE") from None
    if backbone.patch_size != fit.patch_size:
        raise ValueError(
            f"{run}: its smallest patches are of {(p := backbone.patch_size)} pixels; give --patch-size {p}"
        )
    set_thresholds(backbone, ())
    return backbone.requires_grad_(False)
