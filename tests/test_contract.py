"""The contract of backbones, kept by the core and by every family of timm's."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from apt_dense import APTViT

from support.contract import BackboneContract, Case
from support.families import ALL, timm_model
from support.references import randomise


def adaptive(theirs: nn.Module, **options: Any) -> APTViT:
    """Ours with the weights of a timm model, and with random ones for the parameters that only ours has."""
    ours = APTViT.from_timm(theirs, **options)
    if ours.coarse_embed is not None:
        randomise(ours.coarse_embed, 0.1)
    return ours.eval()


class TestFamiliesOfTimm(BackboneContract):
    cases: ClassVar[list[str]] = ALL
    traced: ClassVar[list[str]] = ["dinov2 reg", "dinov3", "aimv2"]

    def make(self, name: str) -> Case:
        theirs = timm_model(name, depth=1)

        def original(images: Tensor) -> tuple[Tensor]:
            tokens = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
            return (tokens.mT.unflatten(2, theirs.patch_embed.dynamic_feat_size(images.shape[2:])),)

        return Case(partial(adaptive, theirs), original, theirs.patch_embed.patch_size[0])


class TestSamsEncoder(BackboneContract):
    """Windows that are cut short, relative positions in windows and over the image."""

    cases: ClassVar[list[str]] = ["windows of 5", "global"]
    traced: ClassVar[list[str]] = ["windows of 5"]

    def make(self, name: str) -> Case:
        windows = {"window_size": 5 if name != "global" else 0, "global_attn_indexes": (1,)}
        theirs = VisionTransformerSAM(
            img_size=128, embed_dim=48, depth=2, num_heads=3, num_classes=0, neck_chans=0, use_rel_pos=True, **windows
        )  # fmt: skip
        randomise(theirs, 0.1)

        def original(images: Tensor) -> tuple[Tensor]:
            return tuple(theirs.forward_intermediates(images, indices=[1], norm=False, intermediates_only=True))

        return Case(partial(adaptive, theirs), original, 16, takes_partial=False)


class TestOptionsOfTheCore(BackboneContract):
    """Combinations that no family has, against the same model without thresholds, whose values others vouch for."""

    SIZES: ClassVar[dict[str, Any]] = {
        "img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
    }  # fmt: skip
    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "windows, residual": {
            "window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True, "residual_block_indexes": (1,),
        },
        "padding dropped": {"drop_padding": True, "class_token": True, "reg_tokens": 2},
        "windows, padding dropped": {"window_size": 4, "window_block_indexes": (1,), "drop_padding": True},
        "several outputs": {"out_indices": (0, 1), "final_norm": True, "norm_intermediates": True},
        "cropped, recomputed": {"partial_patches": "crop", "checkpoint_blocks": True, "pretrain_img_size": 16},
    }  # fmt: skip
    cases: ClassVar[list[str]] = list(OPTIONS)
    traced: ClassVar[list[str]] = ["padding dropped", "windows, padding dropped", "cropped, recomputed"]

    def make(self, name: str) -> Case:
        chosen = {**self.SIZES, **self.OPTIONS[name]}

        def build(**options: Any) -> APTViT:
            model = APTViT(**chosen, **options)
            coarse, model.coarse_embed = model.coarse_embed, None
            randomise(model, 0.2)
            model.coarse_embed = None if coarse is None else randomise(coarse, 0.2)
            return model.eval()

        return Case(build, build(attention_backend="sdpa"), 4, chosen.get("partial_patches") == "crop")
