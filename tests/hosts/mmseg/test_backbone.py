"""The MMSeg backbone: values of MMSeg's VisionTransformer, registries, arguments, frozen parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS as ROOT_MODELS
from mmseg.registry import MODELS

import apt_dense
from apt_dense.hosts.mmseg import APTViT
from apt_dense.weights.load import load_backbone

from support.references import noise
from support.tiny_segmentors import SMALL, backbone, half_flat, mmseg_scope, mmseg_vit  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own


# ---- values of MMSeg's VisionTransformer


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (24, 16), (30, 45), (5, 40)], ids=str)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"final_norm": True}, {"final_norm": True}),
        ({"with_cls_token": False}, {"class_token": False}),
        ({"patch_bias": False, "norm_cfg": {"type": "LN"}}, {"patch_bias": False, "norm_eps": 1e-5}),
        ({"out_indices": (0, 1), "final_norm": True}, {"out_indices": (0, 1), "final_norm": True}),
        ({"out_indices": 0}, {"out_indices": 0}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_plain_vit_is_mmsegs(theirs: dict, ours: dict, size: tuple[int, int]) -> None:
    vit, model = mmseg_vit(**theirs), APTViT(**{**SMALL, "class_token": True, **ours}).eval()
    load_backbone(model, vit.state_dict())
    batch = noise(2, 3, *size)
    expected, maps = vit(batch), model(batch)
    assert len(maps) == len(expected) and maps[-1].std() > 0.3
    for map_, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(map_, other, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_plain_vit_of_another_img_size_is_mmsegs() -> None:
    vit = mmseg_vit(img_size=(48, 32))
    model = APTViT(**{**SMALL, "img_size": (48, 32)}, class_token=True).eval()
    load_backbone(model, vit.state_dict())
    batch = noise(1, 3, 40, 56)
    torch.testing.assert_close(model(batch)[0], vit(batch)[0], atol=1e-4, rtol=0)


def test_the_host_and_the_core_are_the_same_model() -> None:
    host = backbone()
    core = apt_dense.APTViT(**SMALL, thresholds=(4.0,), pos_antialias=False).eval()
    core.load_state_dict(host.state_dict(), strict=True)
    assert torch.equal(host(half_flat(40, 48))[0], core(half_flat(40, 48))[0])


# ---- registries and arguments


@pytest.mark.parametrize("registry", [MODELS, ROOT_MODELS])
def test_built_from_a_config(registry: Any) -> None:
    config = ConfigDict(type="APTViT", **SMALL, thresholds=[5.5, 4.0], out_indices=[0, 1], pixel_mean=[128.5] * 3)
    model = registry.build(config)
    assert type(model) is APTViT and isinstance(model, apt_dense.APTViT)
    assert model.thresholds == (5.5, 4.0) and model.out_indices == (0, 1)


@pytest.mark.parametrize(("out_indices", "count"), [(0, 1), (-1, 1), (1, 1), ((0, 1), 2), ([1], 1)])
def test_outputs_are_a_tuple(out_indices: Any, count: int) -> None:
    maps = backbone(out_indices=out_indices)(half_flat(32, 48))
    assert type(maps) is tuple and len(maps) == count
    assert all(map_.shape == (2, 16, 4, 6) for map_ in maps)


@pytest.mark.parametrize("frozen_stages", [-2, 3, 12])
def test_frozen_stages_out_of_range(frozen_stages: int) -> None:
    with pytest.raises(ValueError, match=f"frozen_stages={frozen_stages} must be from -1 to the number of blocks, 2"):
        backbone(frozen_stages=frozen_stages)


def test_pretrained_and_init_cfg_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="pretrained and init_cfg both"):
        APTViT(**SMALL, pretrained="a.pth", init_cfg={"type": "Pretrained", "checkpoint": "b.pth"})


def test_mmsegs_own_argument_names_are_refused() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        APTViT(embed_dims=16)


# ---- training


@pytest.fixture
def hub() -> Iterator[MessageHub]:
    """The current message hub, without entries of other tests."""
    hub = MessageHub.get_current_instance()
    hub.log_scalars.pop("train/tokens_kept", None)
    yield hub
    hub.log_scalars.pop("train/tokens_kept", None)


@pytest.mark.parametrize(("frozen_stages", "frozen"), [(-1, set()), (0, {"patch_embed", "pos_embed", "cls_token"})])
def test_frozen_embedding(frozen_stages: int, frozen: set[str]) -> None:
    assert frozen_names(backbone(frozen_stages=frozen_stages, class_token=True)) == frozen
    embedding = backbone(frozen_stages=frozen_stages, class_token=True, reg_tokens=2, pre_norm=True)
    assert frozen_names(embedding) == frozen | ({"reg_token", "norm_pre"} if frozen else set())


@pytest.mark.parametrize("frozen_stages", [1, 2])
def test_frozen_blocks(frozen_stages: int) -> None:
    blocks = {f"blocks.{i}" for i in range(frozen_stages)}
    model = backbone(frozen_stages=frozen_stages)
    assert frozen_names(model) == {"patch_embed", "pos_embed"} | blocks
    # A training loop calls train() before every epoch.
    model.train()
    assert frozen_names(model) == {"patch_embed", "pos_embed"} | blocks
    assert [block.training for block in model.blocks] == [i >= frozen_stages for i in range(2)]
    assert not model.patch_embed.training and model.coarse_embed.training


def frozen_names(model: APTViT) -> set[str]:
    """The parts of the model without trainable parameters; fails for parts that are partly frozen."""
    parts: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        depth = 2 if name.startswith("blocks.") else 1
        parts.setdefault(".".join(name.split(".")[:depth]), set()).add(parameter.requires_grad)
    assert all(len(states) == 1 for states in parts.values())
    return {part for part, states in parts.items() if states == {False}}


@pytest.mark.parametrize("with_cp", [False, True])
def test_frozen_parts_get_no_gradient_and_all_others_do(with_cp: bool) -> None:
    model = backbone(frozen_stages=1, with_cp=with_cp).train()
    model(half_flat(32, 32))[0].sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_changes_nothing() -> None:
    outputs = []
    for with_cp in (False, True):
        model = backbone(with_cp=with_cp).train()
        out = model(half_flat(32, 32))[0]
        out.square().sum().backward()
        outputs.append((out.detach(), model.pos_embed.grad))
    assert model.checkpoint_blocks
    for plain, checkpointed in zip(*outputs, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval(norm_eval: bool) -> None:
    model = backbone(norm_eval=norm_eval, final_norm=True)
    assert model.train() is model
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5 and all(norm.training != norm_eval for norm in norms)
    assert model.blocks[0].attn.training and not model.eval().training


def test_tokens_kept_are_logged_in_training(hub: MessageHub) -> None:
    model = backbone()
    batch = half_flat(32, 64)
    model(batch)
    assert "train/tokens_kept" not in hub.log_scalars
    model.train()(batch)
    # Half of each image is cut into patches of 2 x 2 cells.
    assert hub.get_scalar("train/tokens_kept").current() == pytest.approx(0.5 + 0.5 / 4)


BAD_ARGUMENTS = {
    "frozen_stages": [-2, 3, 99, 1.5, "1", True, None],
    "with_cp": ["no", 0, 1, 2, None],
    "norm_eval": ["no", 0, 1, 2, None],
    "pretrained": [3, True, ["a"], {}],
    "init_cfg": [3, "x", True],
    "pos_antialias": ["no", 0, 1, 2, None],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    for value in BAD_ARGUMENTS[name]:
        with pytest.raises((TypeError, ValueError), match=name):
            APTViT(**{**dict(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2), name: value})
