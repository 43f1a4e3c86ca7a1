"""A training with MMEngine's OneCycleLR, whose checkpoints hold references to methods: trained, tested, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mmseg", reason="the segmentation tools need the packages of the extra 'mmseg'")

import eval_seg
import train_seg

from apt_dense.hosts.mmseg.training_config import load_config

from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade  # noqa: F401 (a fixture)

ITERATIONS = 4


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade(tmp_path_factory.mktemp("data") / "ade")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    real = next(path for path in CONFIGS if path.name.startswith("linear_apt_vit-b16"))
    saving = {"default_hooks.checkpoint.interval": 1, "default_hooks.logger.interval": 1}
    cfg = load_config(str(real), {**shrink_options(real), **saving, "model.backbone.drop_path_rate": 0.2})
    cycle = {"type": "OneCycleLR", "eta_max": 0.01, "total_steps": cfg.train_cfg.max_iters, "by_epoch": False}
    cfg.param_scheduler = [cycle]
    path = tmp_path_factory.mktemp("configs") / "one_cycle.py"
    cfg.dump(path)
    return str(path)


def train(config: str, ade: Path, work_dir: Path, *extra: str) -> list[dict]:
    """Train; return the lines of the log of this run."""
    argv = [config, "--data-root", str(ade), "--work-dir", str(work_dir), "--max-iters", str(ITERATIONS)]
    train_seg.main([*argv, *extra])
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime_ns)
    return [line for line in map(json.loads, newest.read_text().splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def whole(config: str, ade: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    work_dir = tmp_path_factory.mktemp("whole")
    return work_dir, train(config, ade, work_dir)


def test_it_trains_in_one_cycle(whole: tuple[Path, list[dict]]) -> None:
    rates = [line["lr"] for line in whole[1]]
    assert len(rates) == ITERATIONS
    # A twenty-fifth at the start, then the peak, then a ten-thousandth of the start: MMEngine's defaults, scaled to
    # the shorter run.
    assert rates[0] == pytest.approx(0.01 / 25) and max(rates) > 5 * rates[0] and rates[-1] < rates[0] / 1000


def test_its_checkpoint_can_be_tested(whole: tuple[Path, list[dict]], config: str, ade: Path, tmp_path: Path) -> None:
    argv = [config, str(whole[0] / "iter_4.pth"), "--data-root", str(ade), "--work-dir", str(tmp_path)]
    assert 0 <= eval_seg.main(argv)["mIoU"] <= 100


def test_it_resumes_in_the_middle(whole: tuple[Path, list[dict]], config: str, ade: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(str(whole[0] / "iter_2.pth"))
    resumed = train(config, ade, tmp_path, "--resume")
    expected = whole[1][2:]
    assert [line["step"] for line in resumed] == [3, 4]
    assert [line["lr"] for line in resumed] == [line["lr"] for line in expected]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in expected], rel=1e-6)


def test_it_is_not_resumed_for_longer(whole: tuple[Path, list[dict]], config: str, ade: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(str(whole[0] / "iter_2.pth"))
    argv = [config, "--data-root", str(ade), "--work-dir", str(tmp_path), "--resume", "--max-iters", "8"]
    with pytest.raises(SystemExit, match="schedule of 4 iterations, but 8 are asked for"):
        train_seg.main(argv)
