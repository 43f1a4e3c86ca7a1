"""The contract of backbones, kept by the backbone of every host, against the host's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.hosts.torchvision import PyramidBackbone
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid
from apt_dense.weights.convert import from_apt

from support.contract import BackboneContract, Case
from support.references import randomise

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def filled(model: nn.Module, backbone_of: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    """Random weights, the same ones whether there are parameters for coarse patches or not."""
    backbone = backbone_of(model)
    coarse, backbone.coarse_embed = backbone.coarse_embed, None
    randomise(model, 0.1)
    backbone.coarse_embed = None if coarse is None else randomise(coarse, 0.1)
    return model.eval()


class TestMMSegmentation(BackboneContract):
    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "class token": {"class_token": True, "out_indices": (0, 1)},
        "recomputed": {"with_cp": True, "norm_eval": True, "final_norm": True},
    }
    cases: ClassVar[list[str]] = list(OPTIONS)

    def make(self, name: str) -> Case:
        pytest.importorskip("mmseg", reason="the original is MMSegmentation's")
        from mmseg.models.backbones import VisionTransformer

        from apt_dense.hosts import mmseg

        chosen = {"img_size": 64, **SMALL, **self.OPTIONS[name]}
        ours = filled(mmseg.APTViT(**chosen))
        theirs = VisionTransformer(
            img_size=(64, 64), embed_dims=48, num_layers=2, num_heads=3, patch_bias=True, patch_size=16,
            with_cls_token=ours.cls_token is not None, out_indices=ours.out_indices,
            final_norm=chosen.get("final_norm", False), norm_cfg={"type": "LN", "eps": 1e-6},
        )  # fmt: skip
        theirs.load_state_dict(from_apt(ours.state_dict(), "mmseg", grid=ours.pos_grid).state)
        theirs.eval()  # which returns nothing
        return Case(lambda **options: filled(mmseg.APTViT(**chosen, **options)), theirs, 16)


class TestDetectron2(BackboneContract):
    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "windows": {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True},
        "windows, residual": {"window_size": 4, "window_block_indexes": (1,), "residual_block_indexes": (0,)},
        "global": {"use_rel_pos": True, "use_act_checkpoint": True},
    }
    cases: ClassVar[list[str]] = list(OPTIONS)

    def make(self, name: str) -> Case:
        pytest.importorskip("detectron2", reason="Detectron2 is built from source (its INSTALL page)")
        from detectron2.modeling import ViT

        from apt_dense.hosts import detectron2

        chosen = {"img_size": 128, **SMALL, **self.OPTIONS[name]}
        theirs = ViT(**{key: value for key, value in chosen.items() if key != "use_act_checkpoint"})
        theirs.load_state_dict(filled(detectron2.APTViT(**chosen)).state_dict())
        return Case(lambda **options: filled(detectron2.APTViT(**chosen, **options)), theirs.eval(), 16, crops=True)


class TestTorchvision(BackboneContract):
    """The backbone with its pyramid on tokens, against the pyramid on the backbone's feature map."""

    cases: ClassVar[list[str]] = ["pyramid"]
    tolerance: ClassVar[float] = 1e-4

    def make(self, name: str) -> Case:
        sizes = {"img_size": 64, "window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True, **SMALL}

        def build(**options: Any) -> PyramidBackbone:
            return filled(PyramidBackbone(APTViT(**sizes, **options), 16), lambda model: model.net)

        whole = build()

        def original(images: Tensor) -> Mapping[str, Tensor]:
            levels = SimpleFeaturePyramid.forward(whole, whole.net(images)[-1])
            return dict(zip(whole.levels, levels, strict=True))

        return Case(build, original, 16, least=2, backbone_of=lambda model: model.net)


def test_every_host_is_here() -> None:
    """A host that is added must add itself to the contract."""
    from pathlib import Path

    import apt_dense.hosts

    folder = Path(apt_dense.hosts.__file__).parent
    hosts = {path.stem for path in folder.iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")}
    shared_files = {"interrupts", "locks", "resumable_randomness"}
    found = {host for host in hosts - shared_files if not host.startswith("coco")}
    assert found == {"mmseg", "detectron2", "torchvision"}
