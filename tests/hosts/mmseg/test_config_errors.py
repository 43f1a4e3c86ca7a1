"""Mistakes in a config: one line that names the key; errors of a training that runs stay as they are."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.config_errors reads MMEngine's configs")

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, init_default_scope
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch.utils.data import Dataset

from apt_dense.hosts.mmseg.config_errors import ConfigError, building_from, check_kinds_of_keys
from apt_dense.hosts.mmseg.runner_with_checked_resume import APTRunner
from apt_dense.weights.files import CheckpointError

from support.tiny_ade import one_thread  # noqa: F401 (a fixture)

register_all_modules(init_default_scope=False)
HEAD = dict(
    type="FCNHead", in_channels=16, channels=16, num_convs=0, concat_input=False, num_classes=2,
    loss_decode=dict(type="CrossEntropyLoss"),
)  # fmt: skip


@DATASETS.register_module(force=True)
class Nothing(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


@HOOKS.register_module(force=True)
class FailingHook(Hook):
    def __init__(self, where: str) -> None:
        setattr(self, where, self._fail)

    def _fail(self, runner: object, *args: Any, **kwargs: Any) -> None:
        raise TypeError("no such thing")


def config(tmp_path: Path, changes: Mapping[str, Any] = {}) -> Config:
    cfg = Config(dict(
        default_scope="mmseg", work_dir=str(tmp_path),
        custom_imports=dict(imports=["apt_dense.hosts.mmseg"]),
        model=dict(
            type="EncoderDecoder", test_cfg=dict(mode="whole"), data_preprocessor=dict(type="SegDataPreProcessor"),
            backbone=dict(type="APTViT", img_size=32, embed_dim=16, depth=1, num_heads=2), decode_head=HEAD,
        ),
        train_dataloader=dict(batch_size=1, sampler=dict(type="InfiniteSampler"), dataset=dict(type="Nothing")),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=1),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        param_scheduler=[dict(type="PolyLR", begin=0, end=1, by_epoch=False)],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        visualizer=dict(type="SegLocalVisualizer"),
    ))  # fmt: skip
    cfg.merge_from_dict(dict(changes))
    return cfg


def with_value(cfg: Config, key: str, value: object) -> Config:
    """Set the value at a dotted key."""
    *path, name = key.split(".")
    node = cfg
    for part in path:
        node = node[part]
    node[name] = value
    return cfg


def refusal(cfg: Config, build: Any) -> str:
    with pytest.raises(ConfigError) as raised, building_from(cfg):
        build(cfg)
    assert "\n" not in str(raised.value)
    return str(raised.value)


MODEL = [
    ("model.type", "Nope", "model in the config cannot be built: KeyError: Nope is not in the"),
    ("model.neck", dict(type="Nope"), "model.neck in"),
    ("model.decode_head.type", "Nope", "model.decode_head in"),
    ("model.decode_head.foo", 3, "model.decode_head in the config cannot be built: TypeError: .* argument 'foo'"),
    ("model.decode_head.in_channels", 17, "model.decode_head in the config cannot be built: AssertionError$"),
    ("model.decode_head.loss_decode.type", "Nope", "model.decode_head.loss_decode in"),
    ("model.decode_head.norm_cfg", dict(type="XX"), "model.decode_head.norm_cfg in"),
    ("model.auxiliary_head", [dict(HEAD, type="Nope")], r"model.auxiliary_head\[0\] in"),
    ("model.backbone.patchsize", 3, "model.backbone in .* did you mean 'patch_size'"),
    ("model.backbone.depth", 0, "model.backbone in .* ValueError: depth=0 must be 1 or more"),
    ("model.data_preprocessor.type", "Nope", "model.data_preprocessor in"),
    ("model.backbone", None, "model in the config cannot be built: TypeError"),
]


@pytest.mark.parametrize(("key", "value", "message"), MODEL, ids=[key for key, _, _ in MODEL])
def test_parts_of_models_are_named(key: str, value: object, message: str, tmp_path: Path) -> None:
    init_default_scope("mmseg")
    cfg = with_value(config(tmp_path), key, value)
    assert re.match(message, refusal(cfg, lambda cfg: MODELS.build(cfg.model)))


RUNNER = [
    ({"optim_wrapper.optimizer.type": "Nope"}, "optim_wrapper.optimizer in"),
    ({"optim_wrapper.optimizer.foo": 1}, "optim_wrapper in"),
    ({"param_scheduler": [dict(type="PolyLR", foo=2)]}, "param_scheduler[0] in"),
    ({"train_dataloader.sampler.type": "Nope"}, "train_dataloader.sampler in"),
    ({"train_dataloader.foo": 1}, "train_dataloader in"),
    ({"train_cfg.type": "Nope"}, "train_cfg in"),
    ({"custom_hooks": [dict(type="Nope")]}, "custom_hooks[0] in"),
    ({"custom_hooks": [dict(type="FailingHook", where="before_run")]}, "custom_hooks[0] in"),
    ({"custom_hooks": [dict(type="FailingHook", where="before_train")]}, "custom_hooks[0] in"),
    ({"visualizer.type": "Nope"}, "visualizer in"),
    ({"visualizer.vis_backends": [dict(type="Nope")]}, "visualizer in"),
    ({"randomness": dict(sed=1)}, "the config cannot be built: TypeError"),
    ({"log_level": "LOUD"}, "log_level in"),
]


@pytest.mark.parametrize(("changes", "message"), RUNNER, ids=str)
def test_parts_of_runs_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, changes)
    assert refusal(cfg, lambda cfg: APTRunner.from_cfg(cfg).train()).startswith(message)


def test_errors_of_a_training_that_runs_stay(tmp_path: Path) -> None:
    cfg = config(tmp_path, {"custom_hooks": [dict(type="FailingHook", where="before_train_iter")]})
    with pytest.raises(TypeError, match="no such thing"), building_from(cfg):
        APTRunner.from_cfg(cfg).train()


@pytest.mark.parametrize("error", [CheckpointError("x"), ConfigError("x"), OSError("x"), ValueError("x")])
def test_other_errors_stay(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, building_from(config(tmp_path)):
        raise error
    assert raised.value is error


KINDS = [
    ("model", "x", "a dictionary"),
    ("train_cfg", 3, "a dictionary"),
    ("train_dataloader", [1], "a dictionary"),
    ("train_dataloader", dict(batch_size=1), "has no dataset"),
    ("default_hooks", "x", "a dictionary"),
    ("custom_hooks", dict(type="EMAHook"), "a list"),
    ("custom_hooks", [dict(a=1)], "a dictionary with a type"),
    ("custom_hooks", ["EMAHook"], "a dictionary with a type"),
    ("param_scheduler", [dict(a=1)], "a dictionary with a type"),
    ("val_evaluator", "mIoU", "a list"),
    ("val_evaluator", dict(type="IoUMetric", iou_metrics=["mFoo"]), "mDice"),
    ("work_dir", 3, "a name"),
    ("load_from", 3, "a name"),
    ("resume", "yes", "True or False"),
    ("train_cfg.max_iters", -2, "1 or more"),
    ("train_cfg.max_iters", "many", "a whole number"),
    ("train_cfg.val_interval", 0, "1 or more"),
    ("default_hooks.checkpoint.interval", "x", "a whole number"),
    ("default_hooks.checkpoint.max_keep_ckpts", 1.5, "a whole number"),
    ("train_dataloader.dataset", dict(type="BaseSegDataset", pipeline="x"), "a list"),
    ("train_dataloader.dataset", dict(type="BaseSegDataset", pipeline=[dict(tpe="Resize")]), "with a type"),
]


@pytest.mark.parametrize(("key", "value", "message"), KINDS, ids=str)
def test_kinds_of_parts_are_checked(key: str, value: object, message: str, tmp_path: Path) -> None:
    cfg = with_value(config(tmp_path), key, value)
    with pytest.raises(ConfigError, match=message) as raised:
        check_kinds_of_keys(cfg)
    assert key in str(raised.value)


def test_good_and_absent_parts_pass(tmp_path: Path) -> None:
    check_kinds_of_keys(config(tmp_path))
    check_kinds_of_keys(Config(dict(model=None, train_cfg=None, work_dir=None, custom_hooks=None)))
