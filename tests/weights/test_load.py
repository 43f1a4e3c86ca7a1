"""Checkpoints: other models' weights find their places, and everything else is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.weights import load
from apt_dense.weights.convert import to_apt
from apt_dense.weights.files import write_checkpoint
from apt_dense.weights.load import LoadReport, fit_state, load_backbone
from apt_dense.weights.timm_arguments import apt_arguments

from support.references import noise, randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small(seed: int = 0, **options: Any) -> APTViT:
    return randomise(APTViT(**{**SMALL, **options}), 0.2, seed)


def small_timm(**options: Any) -> torch.nn.Module:
    options = {**SMALL, "dynamic_img_size": True, **options}
    return randomise(timm.create_model("vit_tiny_patch16_224", **options), 0.2, 1)


def mmseg_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of MMSeg's VisionTransformer, written out by hand."""
    parts = {
        "patch_embed.proj": "patch_embed.projection",
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv.": "attn.attn.in_proj_",
        "attn.proj": "attn.attn.out_proj",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "blocks.": "layers.",
    }
    renamed = {}
    for name, value in state.items():
        if name.startswith("norm."):
            name = name.replace("norm.", "ln1.")
        for theirs, ours in parts.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def same_weights(model: APTViT, state: dict[str, Tensor]) -> bool:
    """Whether a model holds the weights of another state dict wherever both know a name."""
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)


# ---- conversions


def test_own_weights_come_back() -> None:
    source, model = small(0, thresholds=(4.0,), class_token=True), small(1, thresholds=(4.0,), class_token=True)
    report = load_backbone(model, source.state_dict())
    assert same_weights(model, source.state_dict())
    assert report == LoadReport(list(source.state_dict()), [], [], [], [], [])


def test_timm_weights() -> None:
    theirs = small_timm()
    model = small(class_token=True, final_norm=True, thresholds=(4.0,))
    report = load_backbone(model, theirs.state_dict())
    assert same_weights(model, theirs.state_dict())
    assert report.new == [f"coarse_embed.{layer}.{kind}" for layer in ("down", "zero") for kind in ("weight", "bias")]
    assert report.unused == ["head.weight", "head.bias"] and report.missing == report.unexpected == []
    assert len(report.loaded) == len(theirs.state_dict()) - 2


def test_new_parameters_stay_as_initialised() -> None:
    model = APTViT(**SMALL, class_token=True, final_norm=True, thresholds=(4.0,))
    before = model.coarse_embed.down.weight.clone()
    load_backbone(model, small_timm().state_dict())
    assert torch.equal(model.coarse_embed.down.weight, before) and not model.coarse_embed.zero.weight.any()


@pytest.mark.parametrize("final_norm", [True, False])
def test_mmseg_weights(final_norm: bool) -> None:
    source = small(0, class_token=True, final_norm=final_norm)
    model = small(1, class_token=True, final_norm=final_norm)
    renamed = mmseg_state(source.state_dict())
    assert "layers.1.attn.attn.in_proj_bias" in renamed and ("ln1.weight" in renamed) == final_norm
    report = load_backbone(model, renamed)
    assert same_weights(model, source.state_dict()) and not report.converted


def mae_state() -> dict[str, Tensor]:
    """The content of a MAE pre-training file, decoder included."""
    decoder = (
        "mask_token",
        "decoder_pos_embed",
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.weight",
        "decoder_norm.bias",
    )
    encoder = {name: value for name, value in small_timm().state_dict().items() if not name.startswith("head")}
    return {**encoder, **{name: torch.zeros(3) for name in [*decoder, "decoder_pred.weight"]}}


def test_mae_weights_leave_the_decoder_out() -> None:
    model = small(class_token=True, final_norm=True)
    report = load_backbone(model, {"model": mae_state()})
    assert len(report.unused) == 6 and not report.unexpected and same_weights(model, mae_state())


def test_parts_that_the_model_lacks_by_design_are_unused() -> None:
    source = small_timm(depth=4)
    model = small(depth=4, out_indices=1)
    report = load_backbone(model, source.state_dict())
    assert same_weights(model, {k: v for k, v in source.state_dict().items() if k != "pos_embed"})
    assert {name.split(".")[0] for name in report.unused} == {"cls_token", "norm", "head", "blocks"}
    assert {name.split(".")[1] for name in report.unused if name.startswith("blocks")} == {"2", "3"}


def test_loading_changes_no_tensor_of_the_checkpoint() -> None:
    state = small_timm(img_size=64).state_dict()
    copies = {name: value.clone() for name, value in state.items()}
    load_backbone(small(class_token=True, final_norm=True), state)
    assert all(torch.equal(state[name], value) for name, value in copies.items())


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_are_loaded(tmp_path: Path, suffix: str, kind: type) -> None:
    source, model, path = small(0), small(1), tmp_path / f"x{suffix}"
    write_checkpoint(source.state_dict(), path)
    load_backbone(model, kind(path))
    assert same_weights(model, source.state_dict())
    with pytest.raises(FileNotFoundError, match="none.pth does not exist"):
        load_backbone(model, kind(tmp_path / "none.pth"))


def test_names_are_translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By each way to load; load_backbone copies the values without torch's loading, which would convert them again."""
    calls = []
    monkeypatch.setattr(load, "to_apt", lambda *args: calls.append(1) or to_apt(*args))
    state = mmseg_state(small(0, class_token=True).state_dict())
    model = small(1, class_token=True)
    for loading in (load_backbone, fit_state):
        loading(*((model, state) if loading is load_backbone else (state, model)))
        assert len(calls) == 1
        calls.clear()
    model.load_state_dict(state)
    assert len(calls) == 1


def test_values_are_copied_into_the_parameters() -> None:
    """Their storage, type and gradients stay the model's; halves become floats."""
    source, model = small(0), small(1)
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    load_backbone(model, {name: value.half() for name, value in source.state_dict().items()})
    assert same_weights(model, {name: value.half().float() for name, value in source.state_dict().items()})
    for name, p in model.named_parameters():
        assert p is before[name][0] and p.data_ptr() == before[name][1] and p.requires_grad and p.grad is None


# ---- positions


def test_a_model_of_another_size_answers_as_before() -> None:
    """Resampling when loading and resampling in each forward are the same thing."""
    theirs = small_timm()
    larger = APTViT(**{**SMALL, "img_size": (48, 64)}, class_token=True, final_norm=True)
    report = load_backbone(larger, theirs.state_dict())
    assert report.converted == ["pos_embed"] and "pos_embed" in report.loaded
    images = noise(1, 3, 48, 64)
    expected = theirs.forward_features(images)[:, 1:]
    torch.testing.assert_close(larger(images)[0].flatten(2).mT, expected, atol=1e-4, rtol=0)


def test_own_positions_of_a_grid_that_is_no_square_come_back() -> None:
    source, model = (small(seed, img_size=(16, 40), class_token=True) for seed in (0, 1))
    assert load_backbone(model, source.state_dict()).converted == []
    assert torch.equal(model.pos_embed, source.pos_embed)


# ---- what does not fit


def test_missing_weights_are_named() -> None:
    state = small().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(blocks\.1\.mlp\.fc2\.bias\)") as error:
        load_backbone(small(), state)
    assert "not the file of a whole ViT" in str(error.value)


def test_unexpected_weights_are_named_with_what_they_look_like() -> None:
    state = small().state_dict()
    state["blocks.0.attn.qvk.weight"] = state.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(ValueError, match=r"1 missing .* 1 unexpected") as error:
        load_backbone(small(), state)
    assert "Alike: blocks.0.attn.qkv.weight ~ blocks.0.attn.qvk.weight" in str(error.value)


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "reg_token", "norm_pre.weight"])
def test_weights_of_features_without_a_counterpart_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"1 unexpected .{name}"):
        load_backbone(small(), {**small().state_dict(), name: torch.ones(16)})


def test_a_failed_load_leaves_the_model_alone() -> None:
    model = small(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_backbone(model, {**small(0).state_dict(), "extra": torch.zeros(1)})
    assert same_weights(model, before)


def test_without_strict_the_rest_is_loaded() -> None:
    source, model = small(0).state_dict(), small(1)
    kept = model.pos_embed.clone()
    del source["pos_embed"]
    report = load_backbone(model, {**source, "extra": torch.zeros(1)}, strict=False)
    assert report.missing == ["pos_embed"] and report.unexpected == ["extra"]
    assert same_weights(model, source) and torch.equal(model.pos_embed, kept)


@pytest.mark.parametrize(
    ("options", "name", "advice"),
    [
        ({"embed_dim": 32}, "pos_embed|patch_embed", r"embed_dim=32 \(now 16\)"),
        (
            {"patch_size": 16, "img_size": 64},
            "patch_embed.proj.weight",
            r"patch_size=16 \(now 8\), or resize_patches=True to resample it",
        ),
        ({"mlp_ratio": 2.0}, "blocks.0.mlp.fc1.weight", r"mlp_ratio=2.0 \(now 4.0\)"),
        ({"in_chans": 1}, "patch_embed.proj.weight", r"in_chans=1 \(now 3\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_shape_are_named_with_both_shapes(
    options: dict, name: str, advice: str, strict: bool
) -> None:
    message = rf"({name}).* is \(.*\) in the checkpoint and \(.*\) in the model; set {advice}$"
    with pytest.raises(ValueError, match=message):
        load_backbone(small(), small(**options).state_dict(), strict)


def test_files_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(small(0).state_dict(), tmp_path / "x.pth")
    model = small(1)
    load_backbone(model, "~/x.pth")
    assert same_weights(model, small(0).state_dict())
    assert same_weights(APTViT.from_weights("~/x.pth", num_heads=2, act_layer="gelu"), small(0).state_dict())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.ModuleDict({"body": nn.ModuleDict({"net": APTViT(**SMALL)})}),
            r"not ModuleDict; give .* model\.body\.net$",
        ),
        (nn.Linear(1, 1), "not Linear, the file or state dict after it"),
        ("x.pth", "not str, the file or state dict after it"),
    ],
)
def test_other_models_are_refused(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load_backbone(model, {})


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"depth": 1}, {"depth": 2}),
        ({"depth": 4}, {"depth": 2}),
        ({}, {"final_norm": True}),
        ({}, {"class_token": True}),
        ({"qkv_bias": False}, {}),
        ({"patch_bias": False}, {}),
        ({}, {"patch_bias": False}),
    ],
    ids=str,
)
def test_another_architecture_is_refused(source: dict, target: dict) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        load_backbone(small(**target), small(**source).state_dict())


def test_a_convolutional_network_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit the backbone: 0 loaded") as error:
        load_backbone(small(), timm.create_model("resnet18").state_dict())
    assert len(str(error.value)) < 2000


def test_fit_state_says_what_became_of_each_name() -> None:
    state = {**small_timm(img_size=64).state_dict(), "strange": torch.zeros(1)}
    del state["blocks.0.norm1.weight"]
    model = small(class_token=True, thresholds=(4.0,))
    fitted, report = fit_state(state, model)
    assert report.loaded == list(fitted) and report.converted == ["pos_embed"]
    assert report.missing == ["blocks.0.norm1.weight"] and report.unexpected == ["strange"]
    assert report.unused == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    targets = model.state_dict()
    assert all(value.shape == targets[name].shape for name, value in fitted.items())
    assert len(report.loaded) + len(report.missing) + len(report.new) == len(targets)


def test_the_summary_is_one_line_that_counts() -> None:
    report = LoadReport(["a", "b"], ["b"], [], [], [f"head.{i}" for i in range(9)], [])
    expected = "2 loaded; 1 converted (b); 9 unused (head.0, head.1, head.2, head.3, head.4, head.5, ...)"
    assert report.summary() == str(report) == f"{report}" == expected
    assert repr(report) == f"LoadReport({expected})"
    assert str(report._replace(advice="set depth=2 (now 1)")) == f"{expected}; set depth=2 (now 1)"


def test_load_state_dict_takes_the_names_of_other_vits() -> None:
    """torch's own method, also for a backbone inside another module; what does not fit is torch's own error."""
    tiny = {"num_classes": 0, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 28}
    source = randomise(timm.create_model("eva02_tiny_patch14_224", **tiny))
    model = APTViT(**apt_arguments(source))
    wrapped = nn.ModuleDict({"backbone": model})
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("fc_norm.")}
    model.load_state_dict(state)
    expected = model.state_dict()
    model.reset_parameters()
    wrapped.load_state_dict({f"backbone.{name}": value for name, value in state.items()})
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value for name, value in state.items() if "norm1" not in name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "blocks.0.gate.weight": torch.zeros(1)})
