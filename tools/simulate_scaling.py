"""Foresee how long steps of a training take on 1 to 1024 processes, and how much of that is waiting for each other.

    python tools/train_seg.py CONFIG --balance tokens.json --dry-run        # writes tokens.json; train_det.py as well
    python tools/simulate_scaling.py tokens.json --measure base --square 512 --batch-size 2 --out scaling/
    python tools/simulate_scaling.py tokens.json --curve scaling/curve.csv --batch-size 2 --images 20210 --out scaling/

Images have different numbers of tokens, so the processes of a step wait for the one with the most. The simulation goes
through the orders in which the hosts read images, at random or balanced (--balance FILE of both trainers), takes the
time of each batch from a cost curve, and a step's from its slowest process. With a budget (the backbone's token_budget)
each image has the same tokens, and nobody waits.

Augmentation changes tokens. TOKENS with several draws of each image (--balance-draws) stands for a training on these
draws, whose balance is exact. With --new-draws, the order rests on the first draw and the tokens are those of the last:
a training with --balance alone.

Time to exchange gradients and to read images is not part of it: add it to all rows.

TOKENS is a file of token counts: what the trainers' --balance names, or tokens.json of tools/calibrate.py. The cost
curve is measured on this machine (--measure, the backbone's forward and backward passes), or given as a CSV file with
the columns tokens (of a process's batch) and seconds. OUT gets table.md, table.csv, scaling.png, and curve.csv.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("simulate_scaling"):
    import numpy as np
    import torch
    from tqdm import tqdm

    from apt_dense.hosts.token_counts import read_counts
    from apt_dense.hosts.vit_sizes_and_windows import SIZES
    from apt_dense.weights.files import write_text_whole

    from scaling.cost_curve import CostCurve, fit_curve, read_points, write_points
    from scaling.measure_curve import measure_curve
    from scaling.report import Row, draw, table, write_csv
    from scaling.step_times import Setup, balanced_steps, budget_times, resampled, shuffled_steps, step_times
    from shared.machine_and_versions import environment

RANKS = [2**power for power in range(11)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tokens", type=Path, metavar="TOKENS", help="file of token counts")
    add("--out", type=Path, required=True, help="folder of the results")
    curve = parser.add_mutually_exclusive_group(required=True)
    curve.add_argument("--curve", type=Path, metavar="FILE", help="CSV file of tokens and seconds of a batch")
    curve.add_argument("--measure", choices=SIZES, help="size of the ViT to time on this machine")
    add("--square", type=int, default=512, metavar="N", help="pixels of the images to time (default: %(default)s)")
    add("--rounds", type=int, default=5, help="how often each batch is timed (default: %(default)s)")
    add("--amp", action="store_true", help="time in bfloat16")
    add("--ranks", type=int, nargs="+", default=RANKS, metavar="N", help="processes (default: 1 2 4 ... 1024)")
    add("--batch-size", type=int, default=1, help="images per process and batch (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="batches per step of the optimizer (default: %(default)s)")
    add("--images", type=int, metavar="N", help="of the whole data set, if TOKENS holds those of a sample")
    add("--budget", type=float, metavar="N", help="tokens per image with a budget (default: the mean)")
    add("--new-draws", action="store_true", help="balance by the first draw of each image, train on the last")
    add("--steps", type=int, default=500, help="steps to go through (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the orders (default: %(default)s)")
    options = parser.parse_args(argv)
    for name in ("square", "rounds", "batch_size", "accumulate", "images", "budget", "steps"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if min(options.ranks) < 1:
        parser.error(f"--ranks {min(options.ranks)}: expected at least 1")
    return options


def curve_of(options: argparse.Namespace) -> CostCurve:
    """Read or measure the points of the cost curve, and fit it. Raises ValueError, OSError."""
    if options.curve is not None:
        points = read_points(options.curve)
    else:
        points = measure_curve(options.measure, options.square, options.batch_size, options.rounds, options.amp)
    write_points(options.out / "curve.csv", *points)
    return fit_curve(*points)


def read_tokens(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all images that training has, and those that its balance rests on. Raises ValueError,
    OSError."""
    counts, counted_with = read_counts(options.tokens)
    if not counts:
        raise ValueError(f"{options.tokens} holds no images")
    if not options.new_draws:
        tokens = resampled(np.array(counts), options.images, options.seed)
        return tokens, tokens
    draws = counted_with.get("draws") or 1
    if draws < 2:
        raise ValueError(f"{options.tokens} holds one draw of each image; --new-draws needs two (--balance-draws 2)")
    first, *_, last = resampled(np.array(counts).reshape(draws, -1).T, options.images, options.seed).T
    return last, first


def simulate(tokens: np.ndarray, known: np.ndarray, curve: CostCurve, options: argparse.Namespace) -> list[Row]:
    """Simulate each number of processes, balanced by the tokens that are known."""
    rows = []
    for ranks in tqdm(sorted({*options.ranks}), "simulating"):
        setup = Setup(ranks, options.batch_size, options.accumulate)
        random, balanced = (
            step_times(curve, tokens, order, setup, options.steps)
            for order in (shuffled_steps(len(tokens), setup, options.seed), balanced_steps(known, setup, options.seed))
        )
        budget = budget_times(curve, options.budget or tokens.mean(), setup)
        rows.append(Row(ranks, ranks * options.batch_size * options.accumulate, random, balanced, budget))
    return rows


def describe(tokens: np.ndarray, curve: CostCurve, options: argparse.Namespace) -> str:
    """Say what the rows rest on."""
    low, middle, high = np.percentile(tokens, [5, 50, 95])
    source = f"{options.curve}" if options.curve else (
        f"{options.measure} ViT, {options.square} x {options.square}, {'bfloat16' if options.amp else 'float32'}, "
        f"{environment(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}"
    )  # fmt: skip
    return "\n".join([
        f"- tokens per image: {tokens.mean():.0f} on average over {len(tokens)} images of {options.tokens.name}; "
        f"5 % have at most {low:.0f}, half {middle:.0f}, 95 % at most {high:.0f}",
        f"- seconds of a batch of {options.batch_size}: {curve.constant:.4g} + {curve.linear:.4g} * tokens + "
        f"{curve.square:.4g} * tokens^2, at most {curve.error:.1%} from the measured points ({source})",
        f"- {options.accumulate} batches per step, {options.steps} steps of seed {options.seed}; without the exchange "
        f"of gradients",
    ])  # fmt: skip


def run(options: argparse.Namespace) -> list[Row]:
    """Do what the command line asks for. Raises ValueError, OSError."""
    tokens, known = read_tokens(options)
    options.out.mkdir(parents=True, exist_ok=True)
    curve = curve_of(options)
    rows, text = simulate(tokens, known, curve, options), describe(tokens, curve, options)
    write_text_whole(options.out / "table.md", f"{text}\n\n{table(rows)}\n")
    write_csv(rows, options.out / "table.csv")
    draw(rows, options.out / "scaling.png", f"{options.batch_size} images per process, {len(tokens)} images")
    print(f"{text}\n\n{table(rows)}")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"simulate_scaling: {error}")


if __name__ == "__main__":
    with needed_packages("simulate_scaling"):
        shared.interrupts.run(main)
