"""benchmark_ranks: what processes record of real steps, the commands it runs, and what it says of both orders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

for package in ("cv2", "tqdm"):
    pytest.importorskip(package, reason="benchmark_ranks needs it")

import benchmark_ranks
from benchmark_ranks import command_of, describe, parse, predict

from apt_dense import APTViT
from apt_dense.hosts.token_counts import write_counts

from scaling.contrast_data import contrast_picture, write_ade, write_coco
from scaling.rank_times import RankTimes, read_times, record_process, run_processes

TINY = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2, "thresholds": (5.5, 4.0)}
SLOW = 0.5  # seconds that a process keeps the other waiting


def train(folder: Path, rank: int) -> None:
    """Three steps. In the last two, one process continues only once the other is waiting, whatever else is running."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(APTViT(**TINY).train())
    barrier = dist.barrier
    for step in range(3):
        images = torch.rand(1, 3, 64, 64) * 4 - 2 if step == rank else torch.zeros(1, 3, 64, 64)
        loss = model(images)[0].square().mean()
        if step - 1 == rank:
            keep_waiting(folder / f"step {step}, rank {1 - rank} waits")
        dist.barrier = partial(announce, folder / f"step {step}, rank {rank} waits", barrier)
        loss.backward()
        dist.barrier = barrier
    dist.destroy_process_group()


def announce(path: Path, barrier: Callable[..., None], *arguments: dist.ProcessGroup) -> None:
    path.touch()
    barrier(*arguments)


def keep_waiting(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"the other process never came to {path.name}")
        time.sleep(0.01)
    time.sleep(SLOW)


def test_processes_record_their_tokens_and_who_waits(tmp_path: Path) -> None:
    paths = [tmp_path / f"{rank}.jsonl" for rank in range(2)]
    before = DistributedDataParallel.__init__
    ended = run_processes(lambda rank: record_process(partial(train, tmp_path, rank), paths[rank]), 2)
    assert ended == [0, 0] and DistributedDataParallel.__init__ is before
    times = read_times(paths, 0)  # the first step has no beginning
    assert times.tokens.tolist() == [[1, 16], [1, 1]]
    # The first process is slow in the second step, the second in the third: the other one waits.
    assert times.waited[0, 1] > SLOW and times.waited[1, 0] > SLOW
    assert times.own[0, 0] > SLOW and times.own[1, 1] > SLOW
    with pytest.raises(ValueError, match="recorded .0. steps after 2"):
        read_times(paths, 2)


def test_processes_whose_other_fails_are_ended() -> None:
    def main(rank: int) -> None:
        if rank == 0:
            raise RuntimeError("broken")
        time.sleep(600)

    assert run_processes(main, 2) == [1, -9]


def test_pictures_are_half_flat_half_noise_and_complete(tmp_path: Path) -> None:
    ade, coco = write_ade(tmp_path / "ade", 4, 32), write_coco(tmp_path / "coco", 4, 32)
    spread = [np.ptp(contrast_picture(number, 4, 32)) for number in range(4)]
    assert spread[:2] == [0, 0] and min(spread[2:]) > 200
    assert len(list((ade / "images" / "training").iterdir())) == len(list((coco / "train2017").iterdir())) == 4
    assert {path.name for path in (coco / "annotations").iterdir()} == {
        "instances_train2017.json", "instances_val2017.json",
    }  # fmt: skip


def test_trainers_get_their_command_lines(tmp_path: Path) -> None:
    seg = parse(["--out", str(tmp_path), "--data", "ade", "4", "64", "seg", "x.py", "--max-iters", "9"])
    data, out = ["--data-root", str(tmp_path / "data")], str(tmp_path)
    assert command_of(seg, "random") == ["x.py", *data, "--work-dir", f"{out}/random", "--max-iters", "9"]
    assert command_of(seg, "balanced")[3:5] == ["--balance", f"{out}/tokens.json"]
    det = parse(["--out", str(tmp_path), "det", "--config-file", "x.py", "a.b=1"])
    assert command_of(det, "balanced") == [
        "--balance", f"{out}/tokens.json", "--config-file", "x.py", "a.b=1", f"train.output_dir={out}/balanced",
        "train.ddp.fp16_compression=False",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [["--processes", "1"], ["--data", "voc", "4", "64"], ["--data", "ade", "4", "x"]])
def test_bad_options_are_refused(more: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--out", "x", *more, "seg", "x.py"])
    assert more[0] in capsys.readouterr().err


def test_both_orders_are_compared_with_what_was_predicted(tmp_path: Path) -> None:
    """Two sizes of images that cost 1 and 3 seconds: half of the steps wait for 2 seconds of 6."""
    options = parse(["--out", str(tmp_path), "seg", "x.py"])
    write_counts(tmp_path / "tokens.json", [100] * 500 + [300] * 500, {})
    tokens = np.array([[100, 300], [300, 100], [100, 100], [300, 300]])
    random = RankTimes(tokens, tokens / 100, (tokens.max(1, keepdims=True) - tokens) / 100)
    balanced = RankTimes(tokens[2:], tokens[2:] / 100, np.array([[0.1, 0], [0, 0.1]]))
    times = {"random": random, "balanced": balanced}
    assert random.seconds == pytest.approx(2.5) and random.waste == pytest.approx(0.2)
    predicted = predict(options, times)
    assert predicted["random"] == (pytest.approx(2.5, abs=0.05), pytest.approx(0.2, abs=0.02))
    assert predicted["balanced"] == (pytest.approx(2, abs=0.05), pytest.approx(0, abs=0.01))
    text = describe(times, predicted)
    assert "Balance removed 90.0% of the waiting" in text and text.count("\n| balanced | 2 | 2.05 |") == 1
    assert (tmp_path / "curve.csv").is_file()


def test_a_failed_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_ranks, "start_seg", lambda *given: os._exit(3))
    with pytest.raises(SystemExit, match="ended with the statuses"):
        benchmark_ranks.main(["--out", str(tmp_path), "seg", "x.py"])
