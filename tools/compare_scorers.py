"""Compare ways to choose patches on labelled photos, before anything is trained: what merging hides at equal tokens.

    python tools/compare_scorers.py --images data/camvid/images/testing --masks data/camvid/annotations/testing \\
        --zero-is-void --size 364x476 --patch-size 14 --scorer entropy --scorer colour_deviation \\
        --scorer scorer.safetensors --out scorers

Each scorer, a built-in one or a file of tools/fit_scorer.py, merges patches of twice the size, those with the lowest
scores in all photos first, until the photos together keep a share of the tokens. Pixels of another class than most of
their patch are then hidden. The table gives them, in per cent of those that merging all patches would hide; "the masks"
is the choice that hides least, and "ms" the median time in which the coarse scales of a photo are scored, in a batch
of 8; scorers take turns. OUT gets table.csv, table.md and arguments.args. "@FILE" stands for the arguments in a
file, as in configs/evidence.

Judge a learned scorer on photos unlike those it was fitted to: other drives, other days. Scorers that hide less mostly
cost less mIoU, not always (docs/EVIDENCE.md names exceptions); tools/measure_accuracy.py and
tools/compare_by_training.py measure that.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("compare_scorers"):
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from apt_dense.options import PixelFormat
    from apt_dense.patches.scores import SCORERS, Scorer, resolve_scorer, score_maps
    from apt_dense.weights.files import write_text_whole

    from calibration.learned_scorer_training import Fit, other_classes, photo_batches
    from calibration.scorer_report import hidden_by
    from evidence.equal_token_rows import check_size, parse_size
    from evidence.fast_16_bits import in_16_bits
    from evidence.labelled_photos import find_pairs
    from evidence.photos_in_memory import load_set
    from evidence.times_in_turns import milliseconds_in_turns, without_drift
    from shared.argument_files import ArgumentParser, command_line, record_arguments
    from shared.machine_and_versions import environment
    from shared.normalise import normalise
    from shared.option_types import PIXELS, device, number, whole
    from shared.tables import markdown, write_csv

BEST, ROUNDS = "the masks", 10
SCORERS_HELP = f"{', '.join(SCORERS)}, or a file of tools/fit_scorer.py; once for each"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, nargs="+", required=True, metavar="DIR", help="folders of photos")
    add("--masks", type=Path, nargs="+", required=True, metavar="DIR", help="PNG files of the same names, 8-bit labels")
    add("--zero-is-void", action="store_true", help="label 0 is not counted, as 255")
    add("--size", required=True, metavar="HxW", help="pixels that the model sees photos in")
    add("--patch-size", type=whole(1, PIXELS), default=16, metavar="P", help="of the smallest (default: %(default)s)")
    add("--scales", type=whole(1, 16), default=2, metavar="N", help="that are timed (default: %(default)s)")
    add("--scorer", action="append", required=True, metavar="SCORER", help=SCORERS_HELP)
    add(
        "--shares",
        type=number(above=0),
        nargs="+",
        default=[0.8, 0.6, 0.4],
        help="of the tokens (default: %(default)s)",
    )
    add("--limit", type=whole(1), metavar="N", help="photos at most, evenly spread; all are held in memory")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True, help="folder of the table")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> Fit:
    """Turn text into values. Raises ValueError."""
    size = parse_size(args.size)
    check_size(size, args.patch_size)
    if min(size) < args.patch_size << args.scales:
        raise ValueError(f"--size {args.size} holds no patch of {args.patch_size << args.scales} pixels")
    if not all(0.25 <= share < 1 for share in args.shares):
        raise ValueError(f"--shares {args.shares}: expected numbers from 0.25, where one coarse scale ends, to below 1")
    for option, listed in (("scorer", args.scorer), ("shares", [f"{share:.0%}" for share in args.shares])):
        if len({*listed}) < len(listed):
            raise ValueError(f"--{option} {' '.join(listed)}: one of them is listed twice")
    return Fit(args.patch_size, args.scales, size)


def rows(args: argparse.Namespace, fit: Fit) -> Iterator[dict[str, Any]]:
    """One row for each scorer, and one for the best choice. Raises ValueError, OSError."""
    scorers = {name: resolve_scorer(name, PixelFormat()) for name in args.scorer}
    pairs = find_pairs(args.images, args.masks, args.limit)
    data = load_set(pairs, args.zero_is_void, 255, torch.device(args.device), fit.size)
    batches = list(photo_batches(data, in_corners=False))
    hidden = [other_classes(batch.masks, 2 * fit.patch_size) for batch in batches]
    if not torch.cat([part.flatten() for part in hidden]).nan_to_num(0).any():
        raise ValueError("no coarse patch of these masks holds two classes, so that nothing could be hidden")
    each_ms = milliseconds(scorers, batches[0].photos.float(), fit)
    for name, scorer in tqdm(scorers.items(), "scorers", leave=False):
        found = hidden_by(scorer, batches, fit, args.shares, hidden)
        yield {"scorer": name, **by_share(args.shares, found), "ms": each_ms[name]}
    known = iter(hidden)
    best = hidden_by(lambda *_: [next(known).nan_to_num(0)], batches, fit, args.shares, hidden)
    yield {"scorer": BEST, **by_share(args.shares, best)}


def by_share(shares: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    return {f"{share:.0%}": 100 * value for share, value in zip(shares, found, strict=True)}


def milliseconds(scorers: Mapping[str, Scorer], photos: Tensor, fit: Fit) -> dict[str, float]:
    """Of one of these photos by each scorer, in turns, as models ask for scores; the median over rounds."""
    images, scales = normalise(photos, PixelFormat()), range(1, fit.scales + 1)

    @torch.inference_mode()
    def score(scorer: Scorer) -> int:
        with in_16_bits(images.device.type):
            score_maps(images, fit.patch_size, scales, scorer, PixelFormat())
        return len(images)

    forwards = {name: partial(score, scorer) for name, scorer in scorers.items()}
    found = without_drift(milliseconds_in_turns(forwards, ROUNDS, images.device))
    return {name: statistics.median(each) for name, each in found.items()}


def write_tables(args: argparse.Namespace, found: Sequence[dict[str, Any]], command: str) -> str:
    """Write the tables; return the one in Markdown with what it was made by."""
    columns = {"scorer": "{}"} | dict.fromkeys(by_share(args.shares, args.shares), "{:.1f}") | {"ms": "{:.1f}"}
    text = f"    {command}\n\n{markdown(found, columns)}\n\n"
    text += f"{date.today().isoformat()}, {environment(torch.device(args.device))}.\n"
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(found, args.out / "table.csv")
    write_text_whole(args.out / "table.md", text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    command = command_line("compare_scorers", argv)
    try:
        found = list(rows(args, check(args)))
        record_arguments(argv, args.out)
        print(write_tables(args, found, command))
    except (ValueError, OSError) as error:
        sys.exit(f"compare_scorers: {' '.join(str(error).split())}")


if __name__ == "__main__":
    with needed_packages("compare_scorers"):
        shared.interrupts.run(main)
