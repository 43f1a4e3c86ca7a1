"""tools/train_over_seeds.py: which trainings run, that they continue, and the table of their own logs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_over_seeds as tool

from evidence import queued_trainers
from evidence.queued_trainers import SegmentationTrainer
from evidence.training_queue import Setting, parse_setting, summary
from support.tiny_ade import CONFIGS, ROOT, shrink_options, write_ade

#: A training that takes no time: it notes its arguments, and logs a score that follows from the seed and the options.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
argv = sys.argv[1:]
work = Path(argv[argv.index("--work-dir") + 1])
options = dict(o.split("=", 1) for o in argv[argv.index("--cfg-options") + 1:])
with open(work.parent.parent / "calls.txt", "a") as calls:
    calls.write(f"{work.parent.name} {options['randomness.seed']} {'--resume' in argv} {options.get('x')}\\n")
if options.get("x") == "fail":
    sys.exit("train_seg: no such thing")
(work / "1" / "vis_data").mkdir(parents=True, exist_ok=True)
log = open(work / "1" / "vis_data" / "scalars.json", "a")
if options.get("x") == "wait" and "--resume" not in argv:
    def stop(number, frame):
        (work / "last_checkpoint").write_text("iter_1.pth")
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    (work / "ready").touch()
    time.sleep(60)
score = 10.0 * int(options["randomness.seed"]) + len(options.get("x", ""))
for step in (1, 2):
    log.write(json.dumps({"loss": 1.0, "tokens_kept": 0.5, "time": 0.1, "step": step}) + "\\n")
    log.write(json.dumps({"mIoU": score + step, "step": step}) + "\\n")
log.write('{"mIo')
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, and the stand-in in place of train_seg.py."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "config.py").write_text("x = 1\n")
    monkeypatch.setattr(queued_trainers, "TRAIN_SEG", tmp_path / "stand_in.py")
    return tmp_path


def options(folder: Path, *settings: str, seeds: tuple[int, ...] = (0, 1)) -> list[str]:
    named = [word for setting in settings for word in ("--setting", setting)]
    around = ["--out", str(folder / "out"), "--data-root", "data", "--seeds", *map(str, seeds)]
    return [str(folder / "config.py"), *around, *named]


def calls(folder: Path) -> list[str]:
    return (folder / "out" / "calls.txt").read_text().splitlines()


def test_settings_are_names_and_options() -> None:
    assert parse_setting("a b: x.y=1 z=(1,)") == Setting("a b", ("x.y=1", "z=(1,)"))
    assert parse_setting("plain") == Setting("plain", ())
    for text, message in (("", "that of a folder"), ("../x", "that of a folder"), ("a: b", "'b' is not KEY=VALUE")):
        with pytest.raises(ValueError, match=message):
            parse_setting(text)


def test_all_settings_of_a_seed_come_first_and_the_table_has_means(
    stand_in: Path, capsys: pytest.CaptureFixture
) -> None:
    tool.main(options(stand_in, "a: x=12", "b"))
    assert calls(stand_in) == ["a 0 False 12", "b 0 False None", "a 1 False 12", "b 1 False None"]
    printed = capsys.readouterr().out
    assert printed.strip() == (stand_in / "out" / "table.md").read_text().strip()
    # Last scores 2 + 2 and 10 + 2 + 2; 2 and 12.
    assert f"| a | 2 | 9.00 | {statistics.stdev([4, 14]):.2f} | 4.00 | 14.00 | 50.0% | 2 |" in printed
    assert "| b | 2 | 7.00 |" in printed
    tool.main(options(stand_in, "a: x=12", "b"))
    assert len(calls(stand_in)) == 4, "finished runs are kept"
    tool.main(options(stand_in, "a: x=12", "b", seeds=(0, 1, 2)))
    assert calls(stand_in)[4:] == ["a 2 False 12", "b 2 False None"]


def test_a_failed_run_is_reported_and_the_others_go_on(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="bad/seed_0: exit status 1: train_seg: no such thing"):
        tool.main(options(stand_in, "bad: x=fail", "good", seeds=(0,)))
    assert "| good | 1 | 2.00 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main(options(stand_in, "bad: x=fail", "good", seeds=(0,)))
    assert [call.split()[0] for call in calls(stand_in)] == ["bad", "good", "bad"]


def test_interrupted_it_continues_from_the_checkpoint(stand_in: Path) -> None:
    """The training is asked to stop, once, and resumed."""
    code = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tools")!r}]
from pathlib import Path
from evidence import queued_trainers
queued_trainers.TRAIN_SEG = Path({str(stand_in / "stand_in.py")!r})
sys.argv[0] = {str(ROOT / "tools" / "train_over_seeds.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, *options(stand_in, "slow: x=wait", seeds=(0,))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ready = stand_in / "out" / "slow" / "seed_0" / "ready"
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "the same command continues" in errors
    tool.main(options(stand_in, "slow: x=wait", seeds=(0,)))
    assert calls(stand_in) == ["slow 0 False wait", "slow 0 True wait"]


def test_a_folder_of_another_training_is_not_continued(stand_in: Path) -> None:
    with pytest.raises(SystemExit):
        tool.main(options(stand_in, "a: x=fail", seeds=(0,)))
    with pytest.raises(SystemExit, match="holds a training of other settings"):
        tool.main(options(stand_in, "a: x=1", seeds=(0,)))
    (stand_in / "config.py").write_text("x = 2\n")
    with pytest.raises(SystemExit, match="holds a training of other settings"):
        tool.main(options(stand_in, "a: x=fail", seeds=(0,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seeds", "1", "1"], "--seeds: 1 1 names one of them twice"),
        (["--setting", "a: x=2"], "--setting: a a names one of them twice"),
        (["--metric", "mAP"], "its logs hold no mAP"),
        (["--", "--cfg-options", "x=1"], "write them into each --setting"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_a_line(changes: list[str], message: str, stand_in: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.main([*options(stand_in, "a: x=1", seeds=(0,)), *changes])


def test_results_are_those_of_the_last_validation(tmp_path: Path) -> None:
    for name, entries in {
        "2": [{"loss": 1, "time": 3, "tokens_kept": 0.6, "step": 2}, {"mIoU": 5.0, "step": 2}],
        "1": [{"loss": 1, "time": 1, "tokens_kept": 0.8, "step": 1}, {"mIoU": 7.0, "step": 1}],
    }.items():
        (tmp_path / name / "vis_data").mkdir(parents=True)
        (tmp_path / name / "vis_data" / "scalars.json").write_text("\n".join(map(json.dumps, entries)))
    expected = {"step": 2, "mIoU": 5.0, "best": 7.0, "tokens": pytest.approx(0.7), "seconds": 2}
    assert SegmentationTrainer(Path("config.py"), ()).results(tmp_path, ["mIoU"]) == expected


#: A detection training that takes no time: its score follows from the seed and the number of thresholds.
DETECTION = """
import argparse, json
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--out", type=Path)
parser.add_argument("--seed", type=int)
parser.add_argument("--resume", action="store_true", required=True)
parser.add_argument("--amp", action=argparse.BooleanOptionalAction, required=True)
parser.add_argument("--thresholds", nargs="+")
parser.add_argument("--batch-size", type=int, required=True)
args = parser.parse_args()
score = (args.seed + len(args.thresholds) + 10 * args.amp) / 100
(args.out / "log.jsonl").write_text(json.dumps({"iteration": 0, "loss": 1.0}) * 1 + "\\n")
results = {"bbox": {"AP": score, "APs": score / 2}, "tokens_kept": 0.25}
(args.out / "results.json").write_text(json.dumps(results))
"""


def test_detection_is_trained_from_a_folder_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "stand_in.py").write_text(DETECTION)
    monkeypatch.setattr(queued_trainers, "TRAIN_DET", tmp_path / "stand_in.py")
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    (tmp_path / "data" / "annotations" / "instances_train.json").write_text("{}")
    settings = ["--setting", "two: thresholds=5.5,4.0 amp=true", "--setting", "one: thresholds=5 amp=false"]

    def run(out: str, *metrics: str) -> None:
        around = ["--out", str(tmp_path / out), "--seeds", "1", "3", *settings]
        tool.main([str(tmp_path / "data"), *around, "--metric", *metrics, "--", "--batch-size", "2"])

    run("out", "bbox/AP", "bbox/APs")
    printed = capsys.readouterr().out
    assert f"| two | 2 | 14.00 | 7.00 | {2**0.5:.2f} | 13.00 | 15.00 | 25.0% | 1 |" in printed
    assert "| one | 2 | 3.00 | 1.50 |" in printed
    with pytest.raises(SystemExit, match=r"has no segm/AP; choose --metric of bbox/AP, bbox/APs"):
        run("other", "segm/AP")
    (tmp_path / "data" / "annotations" / "instances_train.json").write_text("{ }")
    with pytest.raises(SystemExit, match="holds a training of other settings"):
        run("out", "bbox/AP")


def test_one_seed_has_no_deviation() -> None:
    (row,) = summary([{"setting": "a", "mIoU": 3.0, "tokens": None, "step": 4}], ["mIoU"])
    assert (row["mIoU"], row["deviation"], row["tokens"], row["seeds"]) == (3.0, None, None, 1)


def test_a_real_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("mmseg", reason="trains with MMSegmentation")
    from apt_dense.hosts.mmseg.training_config import load_config

    write_ade(tmp_path / "ade", size=(128, 192))
    path = next(path for path in CONFIGS if path.name.startswith("linear_apt_vit-b16"))
    load_config(str(path), shrink_options(path)).dump(tmp_path / "config.py")
    arguments = options(tmp_path, "adaptive", seeds=(3,))
    arguments[arguments.index("data")] = str(tmp_path / "ade")
    tool.main([*arguments, "--", "--max-iters", "2"])
    (row,) = (json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines())
    assert row["results"]["step"] == 2 and 0 <= row["results"]["mIoU"] <= 100 and row["results"]["tokens"] < 1
    assert f"| adaptive | 1 | {row['results']['mIoU']:.2f} |" in capsys.readouterr().out
