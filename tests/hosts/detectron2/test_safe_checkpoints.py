"""Checkpoints of other ViTs inside Detectron2's models, through its own checkpointer and back."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import convert_checkpoint
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (its INSTALL page)")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import ViT
from torch import Tensor, nn

from apt_dense.hosts.detectron2 import APTViT
from apt_dense.hosts.detectron2.safe_checkpoints import APTCheckpointer, CheckpointError
from apt_dense.weights.convert import from_apt, to_apt
from apt_dense.weights.load import load_backbone
from apt_dense.weights.resize import resize_positions

from support.hostile import Bomb
from support.references import noise, randomise
from support.tiny_coco import ADAPTIVE, ROOT, UNIFORM, one_thread, tiny_model  # noqa: F401

State = dict[str, Tensor]
SMALL = dict(embed_dim=24, depth=2, num_heads=2, img_size=64, patch_size=8, pretrain_img_size=32)
EVA02 = dict(qkv_fused=False, k_bias=False, mlp_layer="swiglu", mlp_ratio=2.5, scale_mlp_norm=True, rotary={},
             norm_layer="layernorm", window_size=4, window_block_indexes=(0,))  # fmt: skip


class Detector(nn.Module):
    """A stand-in for a detector, with the parts that Detectron2's checkpointer looks at."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.net = net
        self.head = nn.Linear(2, 2)


def detector(seed: int = 0, **options: Any) -> Detector:
    return randomise(Detector(APTViT(**{**SMALL, **options})), 0.2, seed)


def eva02_names(state: State) -> State:
    """Rename our weights to those of EVA-02's detectors, and add the tables that each of its blocks repeats."""
    rules = ((r"([qv])_proj\.bias", r"\1_bias"), (r"mlp\.norm", "mlp.ffn_ln"), ("fc1_g", "w1"), ("fc1_x", "w2"),
             (r"mlp\.fc2", "mlp.w3"))  # fmt: skip
    for ours, theirs in rules:
        state = {re.sub(ours, theirs, name): value for name, value in state.items()}
    places = ("rope_win", "rope_glb", "blocks.0.attn.rope", "blocks.1.attn.rope")
    tables = {f"backbone.net.{place}.freqs_{kind}": torch.ones(9, 12) for place in places for kind in ("cos", "sin")}
    return {**state, **tables}


def load(model: nn.Module, state: State, path: Path) -> Any:
    """Load a file with Detectron2's checkpointer; returns the names that were missing and unexpected."""
    torch.save({"model": state, "iteration": 7}, path)
    checkpointer, reports = DetectionCheckpointer(model), []
    checkpointer._log_incompatible_keys = reports.append
    checkpointer.load(str(path))
    (report,) = reports
    return report


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("thresholds", [(), (4.0,)])
def test_detectors_of_eva02_load_without_surgery(tmp_path: Path, thresholds: tuple) -> None:
    source, model = detector(0, **EVA02), detector(1, **EVA02, thresholds=thresholds)
    state = eva02_names(source.state_dict())
    assert {"backbone.net.blocks.0.attn.q_bias", "backbone.net.blocks.1.mlp.w1.weight"} < state.keys()
    report = load(model, state, tmp_path / "eva02.pth")
    new = [f"backbone.net.coarse_embed.{layer}.{kind}" for layer in ("down", "zero") for kind in ("bias", "weight")]
    assert sorted(report.missing_keys) == (new if thresholds else []) and report.unexpected_keys == []
    assert not report.incorrect_shapes
    loaded = {name: value for name, value in model.state_dict().items() if "coarse" not in name}
    assert same(loaded, source.state_dict())
    model.load_state_dict({**model.state_dict(), **state}, strict=True)
    if not thresholds:
        images = noise(1, 3, 64, 48)
        assert torch.equal(model.backbone.net(images)["last_feat"], source.backbone.net(images)["last_feat"])


@pytest.mark.parametrize("name", ["mmseg", "timm"])
def test_other_names_load_below_the_prefix_of_a_detector(tmp_path: Path, name: str) -> None:
    source, model = (detector(seed, pretrain_use_cls_token=name == "mmseg") for seed in (0, 1))
    foreign = from_apt(source.backbone.net.state_dict(), name).state
    state = {f"backbone.net.{key}": value for key, value in foreign.items()}
    report = load(model, state | {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}, tmp_path / "x.pth")
    assert report.missing_keys == []
    assert report.unexpected_keys == (["backbone.net.cls_token"] if name == "mmseg" else [])
    assert same(model.backbone.net.state_dict(), source.backbone.net.state_dict())


def test_missing_and_unknown_weights_of_the_backbone_are_errors(tmp_path: Path) -> None:
    state = {name.replace("qkv.bias", "vkq.bias"): value for name, value in detector().state_dict().items()}
    message = r"does not fit backbone.net: .* 2 missing .*2 unexpected .*strict_loading=False"
    with pytest.raises(RuntimeError, match=message):
        load(detector(1), state, tmp_path / "x.pth")
    report = load(detector(1, strict_loading=False), state, tmp_path / "x.pth")
    assert len(report.missing_keys) == len(report.unexpected_keys) == 2


def test_weights_of_features_that_the_backbone_lacks_are_errors(tmp_path: Path) -> None:
    state = {**detector().state_dict(), "backbone.net.blocks.0.ls1.gamma": torch.ones(24)}
    with pytest.raises(RuntimeError, match=r"does not fit backbone.net: .* 1 unexpected \(blocks.0.ls1.gamma\)"):
        load(detector(1), state, tmp_path / "x.pth")


def test_unknown_weights_keep_what_can_be_said_of_them(tmp_path: Path) -> None:
    """Detectron2 warns of EVA-02's weights that a model without SwiGLU has no place for."""
    state = eva02_names(detector(0, **EVA02).state_dict())
    report = load(detector(1, strict_loading=False, mlp_ratio=2.5), state, tmp_path / "x.pth")
    left = {"backbone.net.blocks.0.mlp.fc1_g.weight", "backbone.net.blocks.0.attn.q_proj.bias"}
    assert left < set(report.unexpected_keys)


def test_weights_of_a_bare_backbone_are_not_lost_silently(tmp_path: Path) -> None:
    state = detector().backbone.net.state_dict()
    with pytest.raises(RuntimeError, match="no weight of the checkpoint belongs to backbone.net.*matching_heuristics"):
        load(detector(1), state, tmp_path / "x.pth")


@pytest.mark.parametrize("image", [(16, 64), (64, 16), (24, 40), 32], ids=str)
@pytest.mark.parametrize("bare", [True, False])
def test_positions_of_a_rectangle_are_resampled(image: int | tuple[int, int], bare: bool, tmp_path: Path) -> None:
    """Also where Detectron2 matches the names of a bare backbone by their ends."""
    source = detector(0, pretrain_img_size=image)
    content = source.backbone.net.state_dict() if bare else {"model": source.state_dict()}
    torch.save(content, tmp_path / "x.pth")
    model, positions = detector(1), source.backbone.net.pos_embed.detach()
    APTCheckpointer(model).load(f"{tmp_path / 'x.pth'}{'?matching_heuristics=True' if bare else ''}")
    expected = resize_positions(positions, (4, 4), 1, source.backbone.net.pos_grid)
    torch.testing.assert_close(model.backbone.net.pos_embed.detach(), expected, atol=1e-6, rtol=0)
    assert torch.equal(model.backbone.net.blocks[1].mlp.fc1.weight, source.backbone.net.blocks[1].mlp.fc1.weight)


def test_weights_of_another_shape_are_errors_of_the_backbone(tmp_path: Path) -> None:
    """Detectron2 removes them with a warning, so the backbone misses them."""
    state = detector(0, pretrain_img_size=64).state_dict()
    with pytest.raises(RuntimeError, match=r"1 missing \(pos_embed\).*taken out weights of another shape"):
        load(detector(1), state, tmp_path / "x.pth")


@pytest.mark.parametrize("arrays", [False, True])
def test_the_projects_own_tool_resamples_positions(tmp_path: Path, arrays: bool) -> None:
    """Positions of a larger image, of SAM's grid, and relative ones. Resumed runs need them in their own shape."""
    options = {"use_rel_pos": True, "pretrain_use_cls_token": False}
    larger = detector(0, pretrain_img_size=64, **options).backbone.net.state_dict()
    state = {f"backbone.net.{name}": value for name, value in from_apt(larger, "sam").state.items()}
    state["backbone.net.blocks.0.attn.rel_pos_h"] = noise(31, 12)
    assert state["backbone.net.pos_embed"].shape == (1, 8, 8, 24)
    content = {"model": {name: value.numpy() for name, value in state.items()} if arrays else state, "__author__": "me"}
    path = tmp_path / ("x.pkl" if arrays else "x.pth")
    path.write_bytes(pickle.dumps(content)) if arrays else torch.save(content, path)
    model = detector(1, **options)
    APTCheckpointer(model).load(str(path))
    expected = resize_positions(larger["pos_embed"], (4, 4), 0)
    assert torch.equal(model.backbone.net.pos_embed, expected)
    assert model.backbone.net.blocks[0].attn.rel_pos_h.shape == (15, 12)
    with pytest.raises(CheckpointError, match=r"1 missing \(pos_embed\)"):
        APTCheckpointer(detector(1, **options), complete=True).load(str(path))
    with pytest.raises(CheckpointError, match="patch_embed.proj.weight is"):
        APTCheckpointer(detector(1, patch_size=16, **options)).load(str(path))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_pickled_code_is_not_run_by_the_projects_own_tool(tmp_path: Path, suffix: str) -> None:
    content, path = {"model": {}, "__author__": Bomb(tmp_path / "exploded")}, tmp_path / f"x{suffix}"
    path.write_bytes(pickle.dumps(content)) if suffix == ".pkl" else torch.save(content, path)
    with pytest.raises(CheckpointError, match="cannot be read: .* holds pickled code"):
        APTCheckpointer(detector()).load(str(path))
    assert not (tmp_path / "exploded").exists()


def test_weights_of_caffe2_are_matched_by_detectron2_s_rules(tmp_path: Path) -> None:
    weights = {"pred_w": np.ones((2, 2), np.float32), "pred_w_momentum": np.ones(1, np.float32)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"blobs": weights}))
    content = APTCheckpointer(detector())._load_file(str(tmp_path / "x.pkl"))
    assert list(content["model"]) == ["pred_w"] and content["matching_heuristics"]


def test_alone_strict_means_what_it_means_in_torch() -> None:
    source, model = detector(0).backbone.net, detector(1).backbone.net
    state = dict(source.state_dict())
    copies = dict(state)
    del state["pos_embed"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["pos_embed"]
    with pytest.raises(RuntimeError, match='Missing key.*"pos_embed"'):
        model.load_state_dict(state)
    model.load_state_dict(copies)
    assert same(model.state_dict(), source.state_dict())
    larger = detector(1, pretrain_img_size=64).backbone.net
    larger.load_state_dict(copies)
    assert larger.pos_embed.shape == (1, 65, 24)
    with pytest.raises(RuntimeError, match="patch_embed.proj.weight is .* in the checkpoint"):
        detector(1, patch_size=16).backbone.net.load_state_dict(copies)


# ---- conversions


@pytest.mark.parametrize("options", [{"use_rel_pos": True, "window_size": 4, "window_block_indexes": (0,)},
                                     {"residual_block_indexes": (1,)}, {"use_abs_pos": False}], ids=str)  # fmt: skip
def test_weights_of_detectron2s_vit_there_and_back(options: dict) -> None:
    theirs, ours = randomise(ViT(**SMALL, **options), 0.2), randomise(APTViT(**SMALL, **options), 0.2, 1)
    report = load_backbone(ours, theirs.state_dict())
    assert report.missing == report.unexpected == report.new == report.unused == []
    assert same(from_apt(ours.state_dict(), "detectron2").state, theirs.state_dict())
    assert same(to_apt(theirs.state_dict(), "detectron2"), ours.state_dict())


def test_the_tool_writes_what_detectron2_loads(tmp_path: Path) -> None:
    """Weights of a classifier with a class token and final norm, in a detector built of Detectron2's parts."""
    source = randomise(APTViT(**{**SMALL, "pretrain_img_size": None, "img_size": 32, "pretrain_use_cls_token": False},
                              class_token=True, final_norm=True), 0.2)  # fmt: skip
    torch.save(source.state_dict(), tmp_path / "in.pth")
    convert_checkpoint.main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--to", "detectron2"])
    model = Detector(ViT(**SMALL))
    checkpointer, reports = DetectionCheckpointer(model), []
    checkpointer._log_incompatible_keys = reports.append
    checkpointer.load(str(tmp_path / "out.pth"))
    assert reports[0].missing_keys == ["head.weight", "head.bias"] and reports[0].unexpected_keys == []
    state = source.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.net.state_dict().items())


# ---- a step of training, saved and loaded


@pytest.mark.parametrize("config", [ADAPTIVE, UNIFORM])
def test_a_trained_state_gives_the_same_output(tmp_path: Path, config: Any) -> None:
    model, fresh = tiny_model(config), tiny_model(config)
    optimizer = torch.optim.SGD(model.backbone.parameters(), 0.1)
    images = noise(1, 3, 96, 96)
    model.train()
    sum(level.square().mean() for level in model.backbone(images).values()).backward()
    optimizer.step()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    randomise(fresh, 0.1, seed=3)
    report = load_quietly(fresh, tmp_path / "model.pth")
    assert report.missing_keys == report.unexpected_keys == []
    with torch.no_grad():
        expected, found = model.eval().backbone(images), fresh.eval().backbone(images)
    assert all(torch.equal(found[level], expected[level]) for level in expected)


def load_quietly(model: nn.Module, path: Path) -> Any:
    checkpointer, reports = DetectionCheckpointer(model), []
    checkpointer._log_incompatible_keys = reports.append
    checkpointer.load(str(path))
    return reports[0]


# ---- resuming


class Part:
    """A trainer, of which only the iteration is kept."""

    iteration = 0

    def state_dict(self) -> dict:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict) -> None:
        self.iteration = state["iteration"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "it lacks trainer"),
        ({"trainer": None}, "its trainer is a NoneType"),
        ({"trainer": 3}, "its trainer is 3 int"),
        ({"trainer": {}}, "it lacks optimizer"),
        (
            {"trainer": {"optimizer": {"state": {}, "param_groups": []}}},
            "a part of it is damaged .KeyError: 'iteration'",
        ),
    ],
)
def test_runs_are_not_continued_without_their_trainer(parts: dict, message: str, tmp_path: Path) -> None:
    """Detectron2 passes over what is missing, and begins with a new optimizer at the first iteration."""
    model, path = nn.Linear(2, 2), tmp_path / "model_0000004.pth"
    torch.save({"model": model.state_dict(), **parts}, path)
    with pytest.raises(CheckpointError, match=f"cannot be continued from: {message}"):
        APTCheckpointer(model, complete=True, trainer=Part()).load(str(path))
    APTCheckpointer(model, complete=True).load(str(path))


def test_all_of_detectron2_s_checkpointers_read_safely(tmp_path: Path) -> None:
    for name in ("a.pkl", ".pkl", "a.pyth", ".pyth"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"model": {}, "model_state": {}, "x": Bomb(tmp_path / "ran")}))
        with pytest.raises(ValueError, match="pickled code"):
            DetectionCheckpointer(nn.Linear(2, 2)).load(str(path))
    assert not (tmp_path / "ran").exists()
