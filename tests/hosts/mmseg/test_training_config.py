"""Configs of runs: overrides reach every place, schedules scale, runs without a GPU are prepared."""

from pathlib import Path

import pytest

from support.tiny_ade import CONFIGS

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.training_config runs MMSeg")

from mmengine.config import Config

from apt_dense.hosts.mmseg import training_config
from apt_dense.hosts.mmseg.training_config import load_config, start_processes, use_amp

UPERNET = next(str(path) for path in CONFIGS if path.name.startswith("upernet_apt_vit-b16"))
without_gpu = pytest.mark.skipif(
    training_config.get_device() != "cpu", reason="asks for what a machine without a GPU does"
)


def roots(cfg: Config) -> list[str]:
    return [cfg.data_root] + [cfg[f"{split}_dataloader"].dataset.data_root for split in ("train", "val", "test")]


def schedule(cfg: Config) -> list[tuple[int, int]]:
    return [(scheduler.begin, scheduler.end) for scheduler in cfg.param_scheduler]


@pytest.mark.parametrize("as_option", [True, False])
def test_one_data_root_reaches_every_data_loader(as_option: bool) -> None:
    cfg = load_config(UPERNET, {"data_root": "/d"}) if as_option else load_config(UPERNET, data_root="/d")
    assert roots(cfg) == ["/d"] * 4


def test_overrides_of_one_place_are_applied_last() -> None:
    cfg = load_config(UPERNET, {"data_root": "/d", "val_dataloader.dataset.data_root": "/v", "max_iters": 1600,
                                "train_cfg.val_interval": 7})  # fmt: skip
    assert roots(cfg) == ["/d", "/d", "/v", "/d"]
    assert cfg.train_cfg.val_interval == 7


@pytest.mark.parametrize("key", ["max_iters", "train_cfg.max_iters", None])
def test_max_iters_scales_the_schedule(key: str | None) -> None:
    cfg = load_config(UPERNET, {key: 1600}) if key else load_config(UPERNET, max_iters=1600)
    assert cfg.train_cfg.max_iters == 1600
    assert schedule(cfg) == [(0, 15), (15, 1600)]
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 1600
    assert cfg.default_hooks.logger.interval == 50


def test_max_iters_scales_all_that_counts_iterations(tmp_path: Path) -> None:
    config = """
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1000)
param_scheduler = [
    dict(type="OneCycleLR", eta_max=0.1, total_steps=1000, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=500, by_epoch=False, begin=500, end=1000),
    dict(type="MultiStepLR", milestones=[400, 800], by_epoch=False),
    dict(type="StepLR", step_size=1, by_epoch=False),
    dict(type="CosineRestartLR", periods=[300, 700], restart_weights=[1, 1], by_epoch=False),
    dict(type="StepLR", step_size=30),
]
"""
    (tmp_path / "schedules.py").write_text(config)
    scaled = load_config(str(tmp_path / "schedules.py"), max_iters=100).param_scheduler
    assert [scaled[0].total_steps, scaled[1].T_max, scaled[1].begin, scaled[1].end] == [100, 50, 50, 100]
    assert [scaled[2].milestones, scaled[3].step_size, scaled[4].periods] == [[40, 80], 1, [30, 70]]
    assert scaled[4].restart_weights == [1, 1] and scaled[5].step_size == 30  # which counts epochs


def test_the_config_s_own_length_changes_nothing() -> None:
    assert load_config(UPERNET, max_iters=160000).to_dict() == Config.fromfile(UPERNET).to_dict()


def test_longer_schedules_keep_their_intervals() -> None:
    cfg = load_config(UPERNET, max_iters=320000)
    assert schedule(cfg) == [(0, 3000), (3000, 320000)]
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 16000


@pytest.mark.parametrize("max_iters", [1, 20, 53])
def test_warm_up_of_no_iteration_is_left_out(max_iters: int) -> None:
    cfg = load_config(UPERNET, max_iters=max_iters)
    assert schedule(cfg) == [(0, max_iters)]
    assert cfg.default_hooks.logger.interval == -(-max_iters // 10)


@pytest.mark.parametrize("max_iters", [0, -1, 1.5, "many"])
def test_bad_max_iters_is_refused(max_iters: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number of iterations"):
        load_config(UPERNET, {"max_iters": max_iters})


@pytest.mark.parametrize(
    "scheduler", [None, dict(type="PolyLR", by_epoch=False, end=100), dict(type="StepLR", step_size=1)]
)
def test_schedules_of_other_forms_are_scaled(scheduler: dict | None, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"train_cfg = dict(max_iters=100)\nparam_scheduler = {scheduler!r}")
    scaled = load_config(str(path), max_iters=10).param_scheduler
    assert scaled is None if scheduler is None else scaled[0].get("end") == (10 if "end" in scheduler else None)


def test_max_iters_of_a_config_by_epochs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epochs.py"
    path.write_text("train_cfg = dict(by_epoch=True, max_epochs=3)")
    with pytest.raises(ValueError, match="trains by epochs"):
        load_config(str(path), max_iters=10)


def test_missing_config_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no config file nowhere.py"):
        load_config("nowhere.py")


@without_gpu
def test_amp_on_a_cpu_is_bfloat16() -> None:
    cfg = load_config(UPERNET, {"optim_wrapper.loss_scale": 512.0})
    use_amp(cfg)
    assert cfg.optim_wrapper.type == "CPUAmpOptimWrapper" and "loss_scale" not in cfg.optim_wrapper
    with pytest.raises(ValueError, match="dtype=float16: mixed precision on a CPU is bfloat16 only"):
        use_amp(load_config(UPERNET, {"optim_wrapper.dtype": "float16"}))


def test_amp_with_a_gpu_is_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_config, "get_device", lambda: "cuda")
    cfg = load_config(UPERNET, {"optim_wrapper.dtype": "bfloat16"})
    use_amp(cfg)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert (cfg.optim_wrapper.loss_scale, cfg.optim_wrapper.dtype) == ("dynamic", "bfloat16")


def test_amp_with_another_wrapper_is_refused() -> None:
    with pytest.raises(ValueError, match="optim_wrapper.type=ApexOptimWrapper"):
        use_amp(load_config(UPERNET, {"optim_wrapper.type": "ApexOptimWrapper"}))


@without_gpu
def test_processes_without_gpus_use_gloo_and_plain_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(training_config.dist, "init_process_group", started.append)
    cfg = load_config(UPERNET)
    start_processes(cfg, "pytorch")
    assert started == ["gloo"] and cfg.env_cfg.dist_cfg.backend == "gloo"
    assert "SyncBN" not in str(cfg.model)
    with pytest.raises(ValueError, match="--launcher slurm needs GPUs"):
        start_processes(cfg, "slurm")
