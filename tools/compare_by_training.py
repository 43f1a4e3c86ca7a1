"""Train a pretrained ViT and a head in several variants over several seeds, and compare their mIoU or AP.

    python tools/compare_by_training.py --model vit_small_patch14_dinov2 --weights dinov2_s14.pth --size 364x476 \\
        --classes 11 --zero-is-void --images data/camvid/images/training --masks data/camvid/annotations/training \\
        --test-images data/camvid/images/testing --test-masks data/camvid/annotations/testing \\
        --row uniform --row "adaptive: tokens=0.6" --row "smaller image: size=(280,364)" \\
        --row "finer: tokens=1.0, patch_size=7, thresholds=(5.5,4.0)" \\
        --row "switched: tokens=0.6, start='uniform', epochs=1, rate=0.1" --out runs/camvid

    python tools/compare_by_training.py @configs/evidence/compare_by_training/camvid_switched.args --seeds 0

    python tools/compare_by_training.py --coco data/nuclei --frozen --model vit_small_patch14_dinov2 \\
        --weights dinov2_s14.pth --size 512 --row uniform --row "adaptive: tokens=0.6, thresholds=(5.5,4.0)" \\
        --row "smaller image: size=(400,400)" --batch 2 --epochs 4 --out runs/nuclei

"@FILE" stands for the arguments in a file. With masks the head is a linear one, and with --coco torchvision's Faster
R-CNN on ViTDet's pyramid, narrow (64 channels) so that two cores can train it; patches are of 16 pixels there, and
sizes are of a photo's longer side.

A row is a name, options of APTViT, and perhaps: "tokens", those of an image on average as a share of the uniform
model's at --size (thresholds are scaled to keep it; without it the row is uniform); "size"; "start", the row whose
weights it starts from; "epochs"; "rate", as a share of --rate (what only APT has learns at its own); "rival", another
way to that share of tokens: "merging" of similar ones, "pruning" with a way back, patches merged at "random". All
photos are held in memory; those with masks need one size. MMSegmentation's own recipes are trained by train_seg.py and
train_over_seeds.py.

With --times, the whole models of all rows are timed in turns, in testing and, unless --frozen, in training, which
compares them fairly; all are in memory then. Without it, times are taken row by row, between hours of training.

OUT gets rows.jsonl (a line for each row and seed), table.csv, table.md, arguments.args and with --plot curves.png, in
which rows whose names differ in a share, as in "smaller image 80 %", are one curve. Interrupted, the same command
continues after the last training that ended. Runs with other seeds may work at the same time in folders of their own:
put the lines of their rows.jsonl into one file, and the command with all seeds makes the table.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("compare_by_training"):
    import torch

    from apt_dense.weights.files import write_text_whole

    from evidence.equal_token_rows import parse_size, square_size
    from evidence.labelled_photos import find_pairs
    from evidence.miou_after_training import SegmentationTask
    from evidence.resumable_rows import KeptRows
    from evidence.times_in_turns import times_of
    from evidence.training_variants import in_order, parse_variant
    from evidence.trainings_of_rows import Task, Trainings, plan_of, row_named
    from shared.argument_files import ArgumentParser, command_line, record_arguments
    from shared.machine_and_versions import environment
    from shared.option_types import SEEDS, device, number, whole
    from shared.tables import markdown, write_csv

COLUMNS = {
    "row": "{}", "size": "{}", "share": "{:.1%}", "tokens": "{:.0f}", "epochs": "{}", "seeds": "{}",
    "mIoU": "{:.2f}", "AP": "{:.2f}", "spread": "{:.2f}", "AP50": "{:.2f}", "APs": "{:.2f}", "APm": "{:.2f}",
    "APl": "{:.2f}",
    "boundary": "{:.2f}", "fine": "{:.2f}", "coarse": "{:.2f}", "accuracy": "{:.2f}", "loss": "{:.3f}",
    "step ms": "{:.0f}", "step range": "{}", "ms": "{:.1f}", "range": "{}", "backbone ms": "{:.1f}",
}  # fmt: skip
_BATCHES = {"mIoU": "batches of 8", "AP": "one at a time"}
_MEANS = tuple(
    name for name in COLUMNS if name not in ("row", "size", "epochs", "seeds", "spread", "step range", "range")
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a timm name")
    add("--weights", type=Path, metavar="FILE", help="default: timm's, downloaded")
    add("--size", required=True, metavar="HxW", help="pixels, whole patches; N of the longer side of COCO's")
    add("--coco", type=Path, metavar="DATA", help="detection data in COCO's layout, in place of the next six")
    add("--classes", type=int, help="number of classes, without void")
    add("--zero-is-void", action="store_true", help="label 0 is not counted, and label n is class n - 1")
    for name, whose in (("", "to train on"), ("test-", "to test on")):
        add(f"--{name}images", type=Path, nargs="+", metavar="DIR", help=f"folders of photos {whose}")
        add(f"--{name}masks", type=Path, nargs="+", metavar="DIR", help="PNG files, 8-bit labels")
    add("--row", action="append", required=True, metavar="TEXT", help='"NAME" or "NAME: OPTION=VALUE, ..."')
    add("--seeds", type=whole(0, SEEDS), nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=4)
    add(
        "--rate",
        type=number(above=0),
        default=1e-3,
        help="of the head (default: %(default)s); the backbone's is a fiftieth",
    )
    add("--frozen", action="store_true", help="train the head only, on features made once: minutes")
    add(
        "--group-by", metavar="ROW", help="scores also of the pixels under its fine and its coarse patches, in all rows"
    )
    add("--limit", type=int, metavar="N", help="photos to train on at most, evenly spread")
    add("--plot", action="store_true", help="draw the scores against tokens")
    add(
        "--times",
        type=whole(1),
        nargs="?",
        const=10,
        metavar="ROUNDS",
        help="then time the rows' models, which take turns; with --plot also draw the scores against milliseconds; for "
        "quiet machines (default: not; ROUNDS: %(const)s)",
    )
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True, help="folder of the results")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Turn text into values. Raises ValueError."""
    _check_data(args)
    args.size = parse_size(args.size) if args.coco is None else square_size(args.size)
    args.rows = in_order([parse_variant(text) for text in args.row])
    oblong = [row.name for row in args.rows if args.coco is not None and row.size and row.size[0] != row.size[1]]
    if oblong:
        raise ValueError(f"row {oblong[0]!r}: with --coco a size is of the longer side, twice: size=(400,400)")
    groups = row_named(args, args.group_by)
    if args.group_by is not None and (groups is None or not groups.is_adaptive):
        raise ValueError(f"--group-by {args.group_by!r}: expected the name of a row with adaptive patches")
    for name, least in (("classes", 2), ("epochs", 1), ("batch", 2), ("limit", args.batch)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected {least} or more")


def _check_data(args: argparse.Namespace) -> None:
    """Raise a ValueError unless there is one data set."""
    labelled = [getattr(args, name) for name in ("classes", "images", "masks", "test_images", "test_masks")]
    if args.coco is None and None in labelled:
        raise ValueError("give --classes, --images, --masks, --test-images and --test-masks, or --coco")
    if args.coco is not None and (args.zero_is_void or any(value is not None for value in [*labelled, args.group_by])):
        raise ValueError("--coco brings classes, photos and labels; leave out options for masks, and --group-by")


def make_task(args: argparse.Namespace) -> Task:
    """Choose segmentation or detection. Raises ValueError, OSError."""
    device = torch.device(args.device)
    if args.coco is not None:
        with needed_packages("compare_by_training"):
            from evidence.detection_task import DetectionTask
        return DetectionTask(args.coco, args.limit, device)
    trained = find_pairs(args.images, args.masks, args.limit)
    tested = find_pairs(args.test_images, args.test_masks)
    return SegmentationTask(trained, tested, args.zero_is_void, device, row_named(args, args.group_by))


def with_times(args: argparse.Namespace, task: Task, found: Sequence[dict]) -> list[dict[str, Any]]:
    """Replace times of rows, measured one after another, by those of models that take turns."""
    thresholds = {row["row"]: row["thresholds"] for row in reversed(found)}  # of the first seed
    times = times_of(task, plan_of(args), args.rows, thresholds, args.times, torch.device(args.device))
    untimed = ({name: value for name, value in row.items() if name not in ("ms", "backbone ms")} for row in found)
    return [{**row, **times[row["row"]]} for row in untimed]


def over_seeds(rows: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One line for each row's name: means over seeds, and the standard deviation of the metric."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row for row in rows if row["row"] == name]
        line = {**same[0], "seeds": len(same)}
        for key in _MEANS:
            values = [row[key] for row in same if row.get(key) is not None]
            line[key] = statistics.fmean(values) if values else None
        line["spread"] = statistics.stdev(row[metric] for row in same) if len(same) > 1 else None
        lines.append(line)
    return lines


def write_tables(args: argparse.Namespace, found: Sequence[dict], metric: str, command: str) -> str:
    """Write the tables; return the one in Markdown with what it was made by."""
    write_csv(found, args.out / "table.csv")
    lines = over_seeds(found, metric)
    text = f"    {command}\n\n{markdown(lines, COLUMNS)}\n\n"
    text += f"{date.today().isoformat()}; trained with {'; '.join(sorted({row['environment'] for row in found}))}.\n"
    is_timed = any("range" in row for row in found)
    text += f"\n{about_times(args, metric)}\n" if is_timed else ""
    write_text_whole(args.out / "table.md", text)
    if args.plot:
        plotter()(lines, "x".join(map(str, args.size)), metric, args.out / "curves.png", is_timed)
    return text


def about_times(args: argparse.Namespace, metric: str) -> str:
    step = "" if args.frozen else f'; "step ms": of a training step of {args.batch} photos'
    rounds = f"{args.times} round{'s' * (args.times > 1)} on {environment(torch.device(args.device))}"
    return f'"ms": of a photo, {_BATCHES[metric]}{step}. Whole models in turns; medians and ranges of {rounds}.'


def plotter() -> Callable[..., None]:
    """Import what draws curves, for which there must be matplotlib."""
    with needed_packages("compare_by_training"):
        from evidence.plot_accuracy_curves import plot_trained
    return plot_trained


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = command_line("compare_by_training", argv)
    try:
        check(args)
        if args.plot:
            plotter()  # not after hours
        args.out.mkdir(parents=True, exist_ok=True)
        task = make_task(args)
        found = list(Trainings(args, task, KeptRows(args.out / "rows.jsonl")).rows())
        record_arguments(argv, args.out)
        if args.times:
            write_tables(args, found, task.metric, command)  # should timing fail, as where memory ends
            found = with_times(args, task, found)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"compare_by_training: {' '.join(str(error).split())}")
    print(write_tables(args, found, task.metric, command))


if __name__ == "__main__":
    with needed_packages("compare_by_training"):
        shared.interrupts.run(main)
