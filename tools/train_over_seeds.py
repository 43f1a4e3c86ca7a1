"""Train a config of MMSegmentation in several settings over several seeds, and write one table of the results.

    python tools/train_over_seeds.py configs/mmseg/linear_apt_dinov2-s14_2k_camvid-364x476.py --out runs/camvid \\
        --seeds 0 1 2 --data-root data/camvid --setting "uniform: model.backbone.thresholds=()" \\
        --setting "adaptive" --setting "half: model.backbone.proportional_attention=0.5" \\
        -- --max-iters 460 --amp

What follows "--" goes to tools/train_seg.py, which trains each run in OUT/SETTING/seed_N. All settings of a seed come
before the next seed. The score is that of the last validation, from the run's own logs. Interrupted (Ctrl-C, SIGTERM,
or killed), the same command continues from the last checkpoint; finished runs are in OUT/runs.jsonl. A run that fails
is reported at the end, and the others go on. OUT also gets table.csv and table.md.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import shlex
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

    from evidence.resumable_rows import KeptRows, markdown, write_csv
    from evidence.training_queue import Run, TrainingFailed, parse_setting, result_of, summary
    from shared.machine_and_versions import environment
    from shared.option_types import SEEDS, whole

COLUMNS = {
    "setting": "{}", "seeds": "{}", "{metric}": "{:.2f}", "deviation": "{:.2f}", "least": "{:.2f}",
    "greatest": "{:.2f}", "tokens": "{:.1%}", "steps": "{}",
}  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--setting", action="append", required=True, metavar="TEXT", help='"NAME" or "NAME: KEY=VALUE KEY=VALUE ..."'
    )
    parser.add_argument("--metric", default="mIoU", help="as it is called in the logs (default: %(default)s)")
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
    if not args.config.is_file():
        raise ValueError(f"no config file {args.config}")
    if "--cfg-options" in args.others:
        raise ValueError("--cfg-options after -- would replace those of the settings; write them into each --setting")
    arguments = ("--data-root", str(args.data_root), *args.others)
    return [Run(setting, seed, args.config, arguments) for seed in args.seeds for setting in settings]


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
    columns = {name.format(metric=args.metric): text for name, text in COLUMNS.items()}
    settings = "; ".join(args.setting)
    text = f"    {command}\n\n{markdown(summary(found, args.metric), columns)}\n\nSettings: {settings}. "
    text += f"{date.today().isoformat()}, {environment(torch.device('cpu'))}.\n"
    write_text_whole(args.out / "table.md", text)
    return text


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = shlex.join(["python", "tools/train_over_seeds.py", *(sys.argv[1:] if argv is None else argv)])
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
