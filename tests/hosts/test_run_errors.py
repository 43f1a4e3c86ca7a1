"""Errors that end a run name the part of the config that failed, and the file that has the traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from apt_dense.hosts.run_errors import LOG, RunError, explaining_errors


class Head(nn.Module):
    def __init__(self, fail: Callable[[], Any]) -> None:
        super().__init__()
        self.conv, self.fail = nn.Conv2d(4, 2, 1), fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fail()
        return self.conv(x)


class Model(nn.Module):
    def __init__(self, fail: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Identity(), Head(fail)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[1](self.heads[0](x))


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


class Crop:
    def __call__(self, item: int) -> int:
        raise ValueError(f"nothing is left\nof {item}")


class Data(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return Crop()(index)


CONFIG = {
    "model": {"type": "Model", "heads": [{"type": "Identity"}, {"type": "Head"}]},
    "loader": {"dataset": {"type": "Data", "pipeline": [{"type": "Other"}, {"type": "Crop"}]}},
    "optimizer": {"_target_": torch.optim.SGD},
}


def check_nothing() -> None:
    raise AssertionError


FAILURES: dict[str, tuple[Callable[[], Any], str]] = {
    "channels": (
        lambda: Model()(torch.ones(1, 3, 8, 8)),
        "model.heads[1] in the config (the model's heads.1.conv) failed: RuntimeError: Given groups=1",
    ),
    "an error without words": (
        lambda: Model(check_nothing)(torch.ones(1, 4, 8, 8)),
        "model.heads[1] in the config failed: AssertionError: raise AssertionError",
    ),
    "a wrapped model": (
        lambda: Wrapper(Wrapper(Model()))(torch.ones(1, 3, 8, 8)),
        "model.heads[1] in the config (the model's heads.1.conv) failed",
    ),
    "the model itself": (lambda: Model()(), "model in the config failed: TypeError: "),
    "no model": (lambda: {}["a name"], "the run failed: KeyError: a name"),
    "an optimizer": (
        lambda: torch.optim.SGD(nn.Linear(1, 1).parameters(), lr="x").step(lambda: 1 / 0),
        "optimizer in the config failed: TypeError: ",
    ),
    "data": (
        lambda: next(iter(DataLoader(Data()))),
        "Crop of loader.dataset.pipeline in the config failed: ValueError: nothing is left of 0",
    ),
    "data of a worker": (
        lambda: next(iter(DataLoader(Data(), num_workers=1))),
        "Crop of loader.dataset.pipeline in the config failed: ValueError: nothing is left of 0",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_part_is_named_and_the_traceback_kept(name: str, tmp_path: Path) -> None:
    fail, expected = FAILURES[name]
    with pytest.raises(RunError) as raised, explaining_errors(tmp_path / "out", CONFIG):
        fail()
    said = str(raised.value)
    log = tmp_path / "out" / LOG
    assert said.startswith(expected) and said.endswith(f"; the full traceback is in {log}") and "\n" not in said
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and Path(__file__).name in text


def test_without_a_config_the_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^the model's heads\.1\.conv failed: "), explaining_errors(tmp_path):
        Model()(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("error", [OSError("disk"), FileNotFoundError("a.jpg"), KeyError("known"), RunError("line")])
def test_errors_that_say_what_to_do_stay(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, explaining_errors(tmp_path, expected=(KeyError,)):
        raise error
    assert raised.value is error and not (tmp_path / LOG).exists()


def test_a_signal_is_no_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), explaining_errors(tmp_path):
        raise KeyboardInterrupt


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = "ValueError: x; no traceback could be written"
    with pytest.raises(RunError, match=said), explaining_errors(tmp_path / "file"):
        raise ValueError("x")


def test_advice_and_further_errors_are_added(tmp_path: Path) -> None:
    for number in range(2):
        raised = pytest.raises(RunError, match=f"ValueError: {number}; try 3; the full")
        with raised, explaining_errors(tmp_path, advice=lambda error: "try 3"):
            raise ValueError(number)
    assert (tmp_path / LOG).read_text().count("Traceback") == 2
