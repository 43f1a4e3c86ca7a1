"""Checkpoints are written whole, read without running code, and refused where they do not fit."""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.safe_checkpoints reads and writes what MMSeg's Runner does")

from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import PARAM_SCHEDULERS

from apt_dense.hosts.mmseg import safe_checkpoints as checkpoints
from apt_dense.hosts.mmseg.safe_checkpoints import (
    check_resume,
    check_start,
    check_weights,
    load_from_safe,
    read_address,
    read_run,
)
from apt_dense.weights.files import CheckpointError, read_checkpoint

from support.fresh_python import run_fresh


def test_interrupted_write_leaves_the_finished_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_file_backend(backend_args=dict(backend="apt_atomic"))
    path = tmp_path / "iter_1.pth"
    backend.put(b"whole", str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["iter_1.pth"]

    def half(self: LocalBackend, obj: bytes, filepath: str) -> None:
        Path(filepath).write_bytes(obj[: len(obj) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalBackend, "put", half)
    with pytest.raises(KeyboardInterrupt):
        backend.put(b"newer", str(path))
    assert path.read_bytes() == b"whole"


def test_run_history_is_read_without_running_code(tmp_path: Path) -> None:
    path = str(tmp_path / "run.pth")
    torch.save(dict(message_hub=HistoryBuffer([1.0], [1]), state_dict=dict(w=torch.ones(2))), path)
    assert read_run(path)["message_hub"].mean() == 1.0
    torch.save(dict(state_dict={}, evil=Path("x")), path)
    with pytest.raises(ValueError, match="cannot be read: .*pickled code other than MMEngine's"):
        read_run(path)


class Sneaky:
    """An object that asks for an attribute which no log buffer needs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return getattr, (HistoryBuffer, "__init__")


def test_no_other_attribute_is_handed_to_a_checkpoint(tmp_path: Path) -> None:
    torch.save(dict(evil=Sneaky()), tmp_path / "run.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        read_run(str(tmp_path / "run.pth"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_checkpoint_is_named_with_its_size(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "iter_1.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"iter_1.pth \({len(content)} bytes\) cannot be read"):
        read_run(str(path))


# ---- addresses


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace torch's download by copying files of ``tmp_path``; returns the list of addresses downloaded so far."""
    fetched: list[str] = []

    def copy(address: str, path: str, progress: bool) -> None:
        fetched.append(address)
        shutil.copy(tmp_path / Path(urlsplit(address).path).name, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", copy)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return fetched


def test_addresses_are_downloaded_once_and_read_without_running_code(tmp_path: Path, server: list[str]) -> None:
    torch.save(dict(w=torch.ones(2)), tmp_path / "vit.pth")
    for _ in range(2):
        assert torch.equal(read_address("https://host/a/vit.pth?download=1")["w"], torch.ones(2))
    assert server == ["https://host/a/vit.pth?download=1"]
    torch.save(dict(evil=Path("x")), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="holds pickled code"):
        read_address("http://other/vit.pth")  # not the file of the same name in the cache
    assert len(server) == 2


def test_names_of_mmcls_are_addresses(tmp_path: Path, server: list[str]) -> None:
    address = checkpoints.get_mmcls_models()["vit_base_p16"]
    torch.save(dict(state_dict=dict(w=torch.ones(2))), tmp_path / address.rpartition("/")[2])
    assert list(read_address("mmcls://vit_base_p16")["state_dict"]) == ["w"]
    assert server == [address]
    with pytest.raises(ValueError, match="mmcls://vit_none is unknown; MMEngine lists vit_base_p16, vit_base_p32"):
        read_address("mmcls://vit_none")


def test_other_addresses_are_read_through_mmengine_s_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(dict(w=torch.ones(2)), tmp_path / "vit.pth")
    opened = []

    @contextmanager
    def fetch(address: str) -> Iterator[str]:
        opened.append(address)
        yield str(tmp_path / "vit.pth")

    monkeypatch.setattr(checkpoints, "get_local_path", fetch)
    assert list(read_address("s3://bucket/vit.pth")) == ["w"] and opened == ["s3://bucket/vit.pth"]


@pytest.mark.parametrize("address", ["pavi://x", "ftp://host/x.pth"])
def test_addresses_of_unknown_kinds_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=f"{address}: expected a file, http://.*download it first"):
        read_address(address)


# ---- checks before a run


def test_load_from_must_be_readable_without_running_code(tmp_path: Path) -> None:
    path = str(tmp_path / "iter_1.pth")
    check_start(Config(dict(load_from=None)))
    check_start(Config(dict()))
    torch.save(dict(state_dict={}, message_hub=HistoryBuffer([1.0], [1])), path)
    check_start(Config(dict(load_from=path)))
    torch.save(dict(state_dict={}, evil=Path("x")), path)
    with pytest.raises(ValueError, match="cannot start from what load_from names: .*pickled code"):
        check_start(Config(dict(load_from=path)))
    with pytest.raises(FileNotFoundError, match="load_from names: .*none.pth does not exist"):
        check_start(Config(dict(load_from=str(tmp_path / "none.pth"))))


def test_load_from_an_address_becomes_the_downloaded_file(tmp_path: Path, server: list[str]) -> None:
    torch.save(dict(state_dict={}), tmp_path / "iter_1.pth")
    cfg = Config(dict(load_from="https://host/iter_1.pth"))
    check_start(cfg)
    assert Path(cfg.load_from).is_file() and cfg.load_from.endswith("-iter_1.pth")
    assert Path(cfg.load_from).is_relative_to(tmp_path / "cache") and len(server) == 1


def test_the_import_adds_nothing_to_torch_s_safe_types() -> None:
    code = (
        "import torch; from mmengine.runner import checkpoint; before = set(torch.serialization.get_safe_globals()); "
        "import apt_dense.hosts.mmseg; print(*{str(kind) for kind in torch.serialization.get_safe_globals() "
        "if kind not in before and 'torch.' not in str(kind)}, 'end')"
    )
    assert run_fresh(code).stdout.splitlines()[-1] == "end"


def resuming(work_dir: Path, checkpoint: str | None, end: int = 10) -> Config:
    if checkpoint is not None:
        (work_dir / "last_checkpoint").write_text(checkpoint)
    return Config(dict(work_dir=str(work_dir), param_scheduler=[dict(by_epoch=False, begin=0, end=end)]))


def test_nothing_to_resume_starts_from_the_beginning(tmp_path: Path) -> None:
    check_resume(resuming(tmp_path, None))


def test_resume_from_a_moved_checkpoint_names_both_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="last_checkpoint names: .*gone.pth does not exist"):
        check_resume(resuming(tmp_path, str(tmp_path / "gone.pth")))


def test_resume_from_an_empty_marker_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="last_checkpoint names"):
        check_resume(resuming(tmp_path, ""))


SCHEDULE = dict(end=10, by_epoch=False)
RUN = dict(
    state_dict={}, meta=dict(iter=4, epoch=0, seed=3), message_hub={}, optimizer={}, param_schedulers=[SCHEDULE]
)  # fmt: skip


def test_resume_with_another_length_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "iter_4.pth")
    torch.save(RUN, path)
    assert check_resume(resuming(tmp_path, path, end=10)) == 3
    with pytest.raises(ValueError, match="schedule of 10 iterations, but 20 are asked for"):
        check_resume(resuming(tmp_path, path, end=20))


@pytest.mark.parametrize("part", ["optimizer", "param_schedulers", "message_hub"])
@pytest.mark.parametrize("value", [None, 3, "x", 1.5, torch.ones(2), ...], ids=str)
def test_resume_without_a_part_is_refused(part: str, value: Any, tmp_path: Path) -> None:
    """MMEngine passes over a missing one, as save_optimizer=False leaves it, and begins with a new optimizer."""
    path, run = str(tmp_path / "iter_4.pth"), {**RUN, part: value}
    if value is ...:
        del run[part]
    torch.save(run, path)
    with pytest.raises(CheckpointError, match=f"{path} cannot be continued from: it.* {part}"):
        check_resume(resuming(tmp_path, path))


@pytest.mark.parametrize("states", [[], [SCHEDULE, SCHEDULE], [3], [{"by_epoch": False, "end": "x"}]], ids=str)
def test_resume_with_other_schedules_is_refused(states: list, tmp_path: Path) -> None:
    path = str(tmp_path / "iter_4.pth")
    torch.save({**RUN, "param_schedulers": states}, path)
    with pytest.raises(CheckpointError, match=path):
        check_resume(resuming(tmp_path, path))


@pytest.mark.parametrize("meta", [{}, dict(iter=3), dict(iter="4", epoch=0), dict(iter=-1, epoch=0)], ids=str)
def test_resume_from_an_unknown_iteration_is_refused(meta: dict, tmp_path: Path) -> None:
    path = str(tmp_path / "iter_4.pth")
    torch.save({**RUN, "meta": meta}, path)
    with pytest.raises(CheckpointError, match="cannot be continued from: it.*(iter|epoch)"):
        check_resume(resuming(tmp_path, path))


def test_resume_beyond_the_end_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "iter_4.pth")
    torch.save({**RUN, "param_schedulers": []}, path)
    cfg = Config(dict(work_dir=str(tmp_path), load_from=path, train_cfg=dict(max_iters=4)))
    check_resume(cfg)
    cfg.train_cfg.max_iters = 3
    with pytest.raises(CheckpointError, match="4 iterations are done, more than the 3 that are asked for"):
        check_resume(cfg)


def test_weights_must_fit_the_model_except_for_those_of_coarse_patches() -> None:
    model = torch.nn.Module()
    model.head, model.bn = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
    state = model.state_dict()
    coarse = {"backbone.coarse_embed.zero.weight": torch.ones(1)}
    without_counter = {name: value for name, value in state.items() if name != "bn.num_batches_tracked"}
    check_weights(model, dict(state_dict=state | coarse), "x.pth")
    check_weights(model, {f"module.{name}": value for name, value in without_counter.items()}, "x.pth")
    wrong = {"bn.weight": torch.ones(3), "other": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"x.pth .* 5 missing \(.*1 unknown \(other\); 1 of another shape \(bn.weight\)"
    ):
        check_weights(model, wrong, "x.pth")


# ---- what schedules and scores leave in a checkpoint

_SCHEDULES = {
    "OneCycle": dict(eta_max=0.1, total_steps=9), "MultiStep": dict(milestones=[2, 3]), "Step": dict(step_size=2),
    "Exponential": dict(gamma=0.9), "CosineAnnealing": dict(T_max=4), "ReduceOnPlateau": dict(monitor="loss"),
    "CosineRestart": dict(periods=[2, 2], restart_weights=[1, 1], eta_min=0.0), "QuadraticWarmup": dict(end=4),
}  # fmt: skip


def schedules() -> Iterator[tuple[str, dict]]:
    """The state of every scheduler that MMEngine registers for learning rates, and of torch's own."""
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    for name, kind in PARAM_SCHEDULERS.module_dict.items():
        if name.endswith("LR") and kind.__module__.startswith("mmengine"):
            options = _SCHEDULES.get(name.removesuffix("LR"), {})
            yield name, kind(torch.optim.SGD(parameters, 0.1), **options).state_dict()
    linear = dict(eta_max=0.1, total_steps=9, anneal_strategy="linear", three_phase=True)
    yield "linear OneCycleLR", OneCycleLR(torch.optim.SGD(parameters, 0.1), **linear).state_dict()
    plain = torch.optim.SGD(parameters, 0.1)
    yield "OneCycleParamScheduler", OneCycleParamScheduler(plain, "lr", eta_max=0.1, total_steps=9).state_dict()
    for name, options in {
        "LambdaLR": dict(lr_lambda=lambda epoch: 1.0), "MultiplicativeLR": dict(lr_lambda=lambda epoch: 1.0),
        "StepLR": dict(step_size=2), "MultiStepLR": dict(milestones=[2, 2, 3]), "ConstantLR": {}, "LinearLR": {},
        "ExponentialLR": dict(gamma=0.9), "PolynomialLR": {}, "CosineAnnealingLR": dict(T_max=3),
        "CosineAnnealingWarmRestarts": dict(T_0=2), "CyclicLR": dict(base_lr=0.1, max_lr=1.0),
        "OneCycleLR": dict(max_lr=1.0, total_steps=9), "ReduceLROnPlateau": {},
    }.items():  # fmt: skip
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
        yield f"torch's {name}", getattr(torch.optim.lr_scheduler, name)(optimizer, **options).state_dict()


def test_checkpoints_of_every_schedule_are_read(tmp_path: Path) -> None:
    path, read = tmp_path / "iter_20.pth", []
    for name, state in schedules():
        torch.save(dict(state_dict=dict(w=torch.ones(2)), param_schedulers=[state]), path)
        found = load_from_safe(str(path))["param_schedulers"][0]
        assert found.keys() == state.keys() and found.get("anneal_func") is state.get("anneal_func"), name
        read.append(name)
    assert "OneCycleLR" in read and len(read) >= 25


SCORES = {
    "float64": np.mean([0.5, 0.7]), "float32": np.float32(0.5), "float16": np.float16(0.5), "int64": np.int64(3),
    "uint8": np.uint8(3), "bool": np.bool_(True), "0-d": np.array(2.5), "0-d int": np.array(3),
    "array": np.ones((2, 3)), "text": np.str_("a"), "texts": np.array(["a", "bc"]), "complex": np.complex64(1j),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl"])
@pytest.mark.parametrize("name", SCORES)
def test_numpy_s_scores_are_read_in_every_format(name: str, suffix: str, tmp_path: Path) -> None:
    path, content = tmp_path / f"best{suffix}", {"model": {"w": torch.zeros(2)}, "best_ap": SCORES[name]}
    for zipped in (True, False):
        if suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
        for read in (read_checkpoint, read_run):
            assert np.array_equal(np.asarray(read(path)["best_ap"]), SCORES[name])
