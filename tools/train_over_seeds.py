"""Train a segmentor or detector in several settings over several seeds, and write one table of the results.

    python tools/train_over_seeds.py configs/mmseg/linear_apt_dinov2-s14_2k_camvid-364x476.py --out runs/camvid \\
        --seeds 0 1 2 --data-root data/camvid --setting "uniform: model.backbone.thresholds=()" \\
        --setting "adaptive" --setting "half: model.backbone.proportional_attention=0.5" \\
        -- --max-iters 460 --amp

    python tools/train_over_seeds.py data/nuclei --out runs/nuclei --metric bbox/AP bbox/AP50 bbox/APs \\
        --setting "uniform: thresholds=none" --setting "adaptive: thresholds=5.2,3.8" \\
        -- --task boxes --iterations 600 --size 512

A config of MMSegmentation is trained by tools/train_seg.py, and a folder of a data set in COCO's layout by
tools/train_det_torchvision.py; what follows "--" goes to them. Settings are KEY=VALUE of the config, or options of the
latter tool ("amp=true" is --amp). A run is in OUT/SETTING/seed_N; all settings of a seed come before the next seed. The
score is that of the last validation, as the run itself noted it. Interrupted (Ctrl-C, SIGTERM,
or killed), the same command continues from the last checkpoint; finished runs are in OUT/runs.jsonl. A run that fails
is reported at the end, and the others go on. OUT also gets table.csv and table.md.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import signal
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("train_over_seeds"):
    import torch
    from tqdm import tqdm

    from apt_dense.hosts.locks import lock_folder
    from apt_dense.weights.files import write_text_whole

    from evidence.queued_trainers import DetectionTrainer, SegmentationTrainer, Trainer, TrainingFailed
    from evidence.resumable_rows import KeptRows
    from evidence.training_queue import Run, parse_setting, result_of, summary
    from shared.argument_files import command_line
    from shared.machine_and_versions import environment
    from shared.option_types import SEEDS, whole
    from shared.tables import markdown, write_csv

COLUMNS = {"deviation": "{:.2f}", "least": "{:.2f}", "greatest": "{:.2f}", "tokens": "{:.1%}", "steps": "{}"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", type=Path, metavar="CONFIG|DATA", help="config file, or folder of detection data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--data-root", type=Path, help="folder of the data set of a config")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--setting", action="append", required=True, metavar="TEXT", help='"NAME" or "NAME: KEY=VALUE KEY=VALUE ..."'
    )
    parser.add_argument(
        "--metric", nargs="+", metavar="NAME",
        help="as logs call them, the first with its spread over seeds (default: mIoU, or bbox/AP)",
    )  # fmt: skip
    argv = sys.argv[1:] if argv is None else list(argv)
    own, others = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    args.others = others
    return args


def runs_of(args: argparse.Namespace) -> list[Run]:
    """List all runs. Raises ValueError."""
    settings = [parse_setting(text) for text in args.setting]
    for kind, values in (("--seeds", args.seeds), ("--setting", [setting.name for setting in settings])):
        if len(set(values)) < len(values):
            raise ValueError(f"{kind}: {' '.join(map(str, values))} names one of them twice")
    trainer = trainer_of(args)
    return [Run(setting, seed, trainer) for seed in args.seeds for setting in settings]


def trainer_of(args: argparse.Namespace) -> Trainer:
    """What trains, and the default of --metric. Raises ValueError."""
    if args.what.is_dir():
        if args.data_root is not None:
            raise ValueError(f"--data-root {args.data_root}: {args.what} is the folder of the data set already")
        args.metric = args.metric or ["bbox/AP"]
        return DetectionTrainer(args.what, tuple(args.others))
    if not args.what.is_file():
        raise ValueError(f"no config file or folder of data {args.what}")
    if args.data_root is None:
        raise ValueError(f"{args.what} is a config; name the folder of its data set with --data-root")
    if "--cfg-options" in args.others:
        raise ValueError("--cfg-options after -- would replace those of the settings; write them into each --setting")
    args.metric = args.metric or ["mIoU"]
    return SegmentationTrainer(args.what, ("--data-root", str(args.data_root), *args.others))


def train_all(args: argparse.Namespace, runs: Sequence[Run]) -> tuple[list[dict], list[str]]:
    """The results of the runs that succeed, and why the others did not."""
    kept, found, failures = KeptRows(args.out / "runs.jsonl"), [], []
    for run in tqdm(runs, "runs"):
        try:
            found.append(result_of(run, args.out, kept, args.metric))
        except TrainingFailed as failure:
            failures.append(str(failure))
            continue
    return found, failures


def write_tables(args: argparse.Namespace, found: Sequence[dict], command: str) -> str:
    """Write the tables, and return the one in Markdown with what it was made by."""
    write_csv([{k: v for k, v in row.items() if k != "content"} for row in found], args.out / "table.csv")
    means = dict.fromkeys(args.metric, "{:.2f}")
    columns = {"setting": "{}", "seeds": "{}", **means, **COLUMNS}
    settings = "; ".join(args.setting)
    text = f"    {command}\n\n{markdown(summary(found, args.metric), columns)}\n\nSettings: {settings}. "
    text += f"{date.today().isoformat()}, {environment(torch.device('cpu'))}.\n"
    write_text_whole(args.out / "table.md", text)
    return text


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = command_line("train_over_seeds", argv)
    try:
        runs = runs_of(args)
        args.out.mkdir(parents=True, exist_ok=True)
        with lock_folder(args.out):
            found, failures = train_all(args, runs)
    except (ValueError, OSError) as error:
        sys.exit(f"train_over_seeds: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command continues") from None
    if found:
        print(write_tables(args, found, command))
    if failures:
        sys.exit("\n".join(f"train_over_seeds: {failure}" for failure in failures))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    shared.interrupts.run(main)
