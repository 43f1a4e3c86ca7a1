"""MMSegmentation's heads on tokens: the values, gradients and statistics of the same heads on feature maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.tiny_segmentors import CLASSES, PREPROCESSOR, half_flat, mmseg_scope  # noqa: F401

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from apt_dense.hosts.mmseg import token_heads
from apt_dense.nn.unscattered_maps import TokenMap

from support.references import randomise

NORM = {"type": "BN", "requires_grad": True}
COMMON = {"num_classes": CLASSES, "norm_cfg": NORM, "align_corners": False, "dropout_ratio": 0.3}
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
LINEAR = {"type": "FCNHead", "num_convs": 0, "concat_input": False, "in_channels": 16, "channels": 16, "in_index": 0}
UPER = {"type": "UPerHead", "in_channels": [16] * 4, "in_index": [0, 1, 2, 3], "pool_scales": (1, 2), "channels": 8}
AUXILIARY = {"type": "FCNHead", "in_channels": 16, "in_index": 2, "channels": 8, "num_convs": 1, "concat_input": False}
NECK = {"type": "Feature2Pyramid", "embed_dim": 16, "rescales": [4, 2, 1, 0.5], "norm_cfg": NORM}
QUARTERS = {"out_indices": (0, 1, 2, 3)}
MODELS_OF: dict[str, dict[str, Any]] = {
    "linear": {"decode_head": LINEAR},
    "1 x 1 convolutions": {"decode_head": {**LINEAR, "num_convs": 2, "kernel_size": 1, "concat_input": True}},
    "3 x 3 convolution": {"decode_head": {**LINEAR, "num_convs": 1, "channels": 8}},
    "upernet": {"decode_head": UPER, "neck": NECK, "auxiliary_head": [AUXILIARY, LINEAR], "backbone": QUARTERS},
    "our upernet": {"decode_head": {**UPER, "type": "APTUPerHead"}, "neck": NECK, "backbone": QUARTERS},
    "upernet on one scale": {"decode_head": UPER, "auxiliary_head": AUXILIARY, "backbone": QUARTERS},
}
PATCHES: dict[str, dict[str, Any]] = {
    "thresholds": {"thresholds": (4.0, 4.0), "class_token": True},
    "padding dropped": {"thresholds": (4.0, 4.0), "drop_padding": True},
    "uniform, padding dropped": {"drop_padding": True},
    "budget": {"thresholds": (4.0, 4.0), "token_budget": 0.6},
    "budget, padding dropped": {"thresholds": (4.0, 4.0), "token_budget": 0.7, "drop_padding": True},
}


def segmentor(kind: str, name: str, patches: str) -> nn.Module:
    config = copy.deepcopy(MODELS_OF[name])
    config["backbone"] = {"type": "APTViT", **SIZES, **PATCHES[patches], **config.get("backbone", {})}
    heads = [config["decode_head"], *(h for h in _listed(config.get("auxiliary_head")))]
    for head in heads:
        head.update({**COMMON, **head})
        if kind == "EncoderDecoder":
            head["type"] = head["type"].removeprefix("APT")
    model = MODELS.build({"type": kind, "data_preprocessor": PREPROCESSOR, "test_cfg": {"mode": "whole"}, **config})
    return randomise(model, 0.2)


def _listed(part: Any) -> list[Any]:
    return [] if part is None else part if isinstance(part, list) else [part]


def batch() -> Tensor:
    images = half_flat(64, 80)
    images[0, :, -20:] = 0  # padding, also of cells that a patch covers in part
    images[1, :, :, -9:] = 0
    return images


def samples(images: Tensor) -> list[SegDataSample]:
    labels = torch.randint(CLASSES, (len(images), 1, *images.shape[2:]), generator=torch.Generator().manual_seed(0))
    return [SegDataSample(gt_sem_seg=PixelData(data=each)) for each in labels]


def pair(name: str, patches: str) -> tuple[nn.Module, nn.Module]:
    """The same segmentor with heads on tokens and with heads on maps."""
    ours, plain = (segmentor(kind, name, patches) for kind in ("APTEncoderDecoder", "EncoderDecoder"))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(ours.state_dict())
    assert ours._takes_tokens()
    return ours, plain


@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("name", MODELS_OF)
@torch.no_grad()
def test_logits_are_those_of_heads_on_maps(name: str, patches: str) -> None:
    ours, plain = pair(name, patches)
    found, expected = (model.eval()(batch(), mode="tensor") for model in (ours, plain))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("name", MODELS_OF)
def test_training_is_that_of_heads_on_maps(name: str, patches: str) -> None:
    """Losses, gradients of all parameters and running statistics, with the same draws of dropout."""
    results = []
    for model in pair(name, patches):
        model.train()
        torch.manual_seed(3)
        images = batch()
        losses = {k: v for k, v in model(images, samples(images), mode="loss").items() if "loss" in k}
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert not [n for n, g in gradients.items() if g is None]
        statistics = {n: b for n, b in model.named_buffers() if "running" in n or "tracked" in n}
        results.append((losses, gradients, statistics))
    for own, other in zip(*results, strict=True):
        assert own.keys() == other.keys()
        for key, value in own.items():
            torch.testing.assert_close(value, other[key], atol=2e-4, rtol=2e-3, msg=key)


@pytest.mark.parametrize("name", MODELS_OF)
def test_autocast_trains(name: str) -> None:
    results = []
    for model in pair(name, "thresholds"):
        torch.manual_seed(3)
        images = batch()
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.train()(images, samples(images), mode="loss")
        total = sum(v for k, v in losses.items() if "loss" in k)
        total.backward()
        results.append(total.detach().float())
    torch.testing.assert_close(*results, atol=0.05, rtol=0.05)


def test_fewer_rows_reach_the_layers() -> None:
    """The point of it: a 1 x 1 convolution sees tokens, not cells."""
    ours, _ = pair("upernet", "thresholds")
    seen = {}
    for index, lateral in enumerate(ours.decode_head.lateral_convs):
        lateral.conv.register_forward_hook(lambda m, args, out, index=index: seen.update({index: args[0]}))
    ours.eval()(batch(), mode="tensor")
    assert [isinstance(seen[i], TokenMap) for i in range(3)] == [True] * 3
    assert len(seen[0].tiles) < 0.8 * seen[0].shape[0] * 80


def test_the_largest_map_is_never_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """APTUPerHead's first layer takes its tokens, and nothing else looks at it."""
    ours, _ = pair("our upernet", "thresholds")
    seen, plain = [], ours.decode_head.forward
    monkeypatch.setattr(ours.decode_head, "forward", lambda inputs: seen.extend(inputs) or plain(inputs))
    ours.eval()(batch(), mode="tensor")
    assert len(seen) == 4 and seen[0]._map is None and seen[1]._map is None


@pytest.mark.parametrize("change", ["hook", "unknown head", "uniform"])
def test_other_heads_get_maps(change: str) -> None:
    ours, _ = pair("linear", "thresholds")
    if change == "hook":
        ours.backbone.register_forward_hook(lambda module, args, out: None)
    elif change == "unknown head":
        ours.decode_head.__class__ = type("Other", (type(ours.decode_head),), {})
    else:
        ours = segmentor("APTEncoderDecoder", "linear", "uniform, padding dropped")
        ours.backbone.patches = ours.backbone.patches.__class__(patch_size=8)
    assert not ours._takes_tokens()
    assert all(isinstance(m, Tensor) for m in ours.extract_feat(batch()))


def test_statistics_that_processes_exchange_need_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("upernet", "thresholds")
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert ours.train()._takes_tokens()
    monkeypatch.setattr(token_heads.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(token_heads.dist, "get_world_size", lambda: 2)
    assert not ours._takes_tokens() and ours.eval()._takes_tokens()
