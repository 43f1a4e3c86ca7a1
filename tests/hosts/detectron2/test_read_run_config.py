"""The config.yaml of a Detectron2 run, read and built without running what it says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed (it is built from source, see its INSTALL page)")

import yaml
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from torch import nn

from apt_dense.hosts.detectron2.read_run_config import build, find_all, read_run_config, resolved

from support.tiny_coco import ADAPTIVE, tiny_config


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_what_a_run_dumps_is_read_with_its_references(tmp_path: Path) -> None:
    LazyConfig.save(tiny_config(ADAPTIVE), str(tmp_path / "config.yaml"))
    path = tmp_path / "config.yaml"
    config = resolved(read_run_config(path), path)
    net = config["model"]["backbone"]["net"]
    assert net["channel_order"] == "RGB" and net["pixel_mean"] == [123.675, 116.28, 103.53]
    norm = build(net["norm_layer"], path)
    assert isinstance(norm, partial) and norm.func is nn.LayerNorm and norm.keywords == {"eps": 1e-6}
    shape = build(config["model"]["roi_heads"]["box_head"]["input_shape"], path)
    assert shape == ShapeSpec(channels=16, height=7, width=7)
    (edge,) = find_all(config["dataloader"]["test"], "ResizeShortestEdge")
    assert (edge["short_edge_length"], edge["max_size"]) == (128, 128)


def test_values_are_built(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: {_target_: torch.nn.modules.linear.Linear, in_features: 3, out_features: '${n}'}\nn: 4\n"
        "dataloader: {x: !!python/tuple [1, {y: [2]}]}\n",
    )
    config = resolved(read_run_config(path), path)
    assert build(config["model"], path).weight.shape == (4, 3)
    assert build(config["dataloader"], path) == {"x": [1, {"y": [2]}]}


HOSTILE = {
    "apply": "!!python/object/apply:os.mkdir ['{0}']",
    "apply in a list": "[!!python/object/apply:os.mkdir ['{0}']]",
    "new": "!!python/object/new:os.mkdir ['{0}']",
    "name": "{{_target_: !!python/name:os.mkdir '', name: '{0}'}}",
    "module": "!!python/module:evil ''",
    "object": "!!python/object:evil.Anything {{a: 1}}",
    "target": "{{_target_: os.mkdir, path: '{0}'}}",
    "module of detectron2": "{{_target_: detectron2.modeling.backbone.vit.torch.hub.load, repo_or_dir: '{0}'}}",
    "function": "{{_target_: detectron2.layers.cat, tensors: []}}",
    "through torch": "{{_target_: torch.nn.modules.module.os.mkdir, path: '{0}'}}",
    "foreign class": "{{_target_: detectron2.modeling.meta_arch.build.Registry, name: x}}",
    "not installed": "{{_target_: detectron2.modeling.evil.Anything}}",
    "current folder": "{{_target_: evil.Anything}}",
    "partial": "!!python/object/apply:functools.partial\n  args: [&a !!python/name:os.mkdir '']\n"
    "  state: !!python/tuple [*a, !!python/tuple [], {{path: '{0}'}}, null]",
    "no name": "{{_target_: 3}}",
    "nested": "{{_target_: torch.nn.modules.container.ModuleList, modules: [{{_target_: os.mkdir, path: '{0}'}}]}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_of_a_stranger_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('ran')\n")
    path = written(tmp_path, f"model:\n  part: {HOSTILE[name].format(tmp_path / 'ran')}\n")
    if name == "apply":  # by this one, Detectron2's own reader is fooled
        yaml.unsafe_load(path.read_text())
        (tmp_path / "ran").rmdir()
    with pytest.raises(ValueError, match="config.yaml"):
        build(resolved(read_run_config(path), path)["model"], path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "model: 3\n", "\x00", "a: b\n", "model: !!binary x\n"])
def test_files_of_another_kind(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the config of a Detectron2 run"):
        read_run_config(written(tmp_path, text))


def test_references_to_nothing_and_wrong_arguments(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {a: '${b.c}'}\n")
    with pytest.raises(ValueError, match=r"config.yaml: .*b\.c"):
        resolved(read_run_config(path), path)
    with pytest.raises(ValueError, match="Linear cannot be built"):
        build({"_target_": "torch.nn.modules.linear.Linear", "colour": 3}, path)
