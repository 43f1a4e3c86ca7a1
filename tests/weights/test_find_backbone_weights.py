"""The state dict of a backbone inside files of whole models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT
from apt_dense.weights.convert import from_apt
from apt_dense.weights.find_backbone_weights import unwrap
from apt_dense.weights.load import load_backbone

PREFIXES = "module.", "_orig_mod.", "backbone.", "net.", "image_encoder.", "model."


def small(**options: Any) -> APTViT:
    return APTViT(**{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, **options})


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema", "module"])
def test_wrapped_state_dicts(wrapper: str) -> None:
    state = small().state_dict()
    assert unwrap({wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}).keys() == state.keys()


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "module.backbone."])
def test_prefixes_are_taken_off(prefix: str) -> None:
    state = small().state_dict()
    whole = {prefix + name: value for name, value in state.items()} | {
        prefix.replace("backbone.", "") + "decode_head.conv_seg.weight": torch.zeros(2)
    }
    unwrapped = unwrap({"state_dict": whole})
    assert state.keys() <= unwrapped.keys() and all(torch.equal(unwrapped[k], v) for k, v in state.items())
    if "backbone" in prefix:
        assert unwrapped.keys() == state.keys()


def test_the_backbone_prefix_is_kept_on_request() -> None:
    state = {"backbone.pos_embed": torch.zeros(1), "decode_head.bias": torch.zeros(1)}
    assert unwrap(state, backbone=False) == state


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, {"model": {}}, {"state_dict": {"a": 1}}, [1, 2], torch.zeros(2)], ids=str
)
def test_content_without_weights_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="no state dict found in the checkpoint"):
        unwrap(content)


@pytest.mark.parametrize("prefixes", [*itertools.permutations(PREFIXES, 2), PREFIXES, PREFIXES[::-1]], ids="".join)
def test_prefixes_may_come_in_any_order(prefixes: tuple[str, ...]) -> None:
    """Below heads of the whole model, and with other names next to the backbone at every level."""
    state = small(class_token=True).state_dict()
    for prefix in reversed(prefixes):
        state = below(prefix, state) | {"decode_head.weight": torch.ones(1), "steps": torch.ones(1)}
    assert unwrap({"state_dict": state}).keys() == small(class_token=True).state_dict().keys()


@pytest.mark.parametrize("target", ["timm", "mmseg", "sam", "detectron2"])
def test_prefixes_of_all_formats(target: str) -> None:
    state = small(class_token=target in ("timm", "mmseg")).state_dict()
    model = small(class_token=target in ("timm", "mmseg"))
    load_backbone(model, below("_orig_mod.module.backbone.net.", from_apt(state, target).state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_two_backbones_are_not_told_apart() -> None:
    """One would be dropped silently; the error shows the names."""
    state = small().state_dict()
    both = below("module.backbone.", state) | below("module.model.", state)
    assert all(name.startswith(("backbone.", "model.")) for name in unwrap(both))
    with pytest.raises(ValueError, match=r"unexpected \(backbone\."):
        load_backbone(small(), both)


def test_a_part_of_the_backbone_elsewhere_keeps_the_prefix() -> None:
    state = below("backbone.", small().state_dict())
    state["pos_embed"] = state.pop("backbone.pos_embed")
    assert unwrap(state).keys() == state.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_whole_models_lose_the_prefixes_of_training_alone(prefix: str) -> None:
    state = below("backbone.", small().state_dict()) | {"decode_head.weight": torch.ones(1)}
    assert unwrap(below(prefix, state), backbone=False).keys() == state.keys()
