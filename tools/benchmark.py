"""Time, memory and FLOPs of the adaptive models, their uniform twins and dense baselines, in one run on real photos.

    python tools/benchmark.py --model vitdet-b --sizes 1024 --keep 0.6
    python tools/benchmark.py --model vit-b --steps inference training --sizes 512 1024 2048 --csv v.csv --plot v.png
    python tools/benchmark.py --scope pyramid detector segmentor --batches 1 8 --csv results.csv --resume

Weights are random (the time does not depend on them) and the same for all variants of a comparison. Variants take turns
in every round, so that a busy machine slows all of them. "smaller image" and "larger patches" are uniform models that
see as many tokens as the adaptive one.

Reported are the median and the spread of the rounds; ratios of medians, "x timm" = timm's time / this one's; efficiency
= (time ratio to the uniform twin) / (FLOP ratio to it), FLOPs counted on these very photos; the growth of the peak of
tensor memory; for our backbones the share of the time outside of the transformer blocks.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("benchmark"):
    import torch
    from tqdm import tqdm

    from benchmarks.backbones import backbone_candidates, pyramid_candidates
    from benchmarks.detectors import detector_candidates
    from benchmarks.measure_in_turns import Candidate, Way, measure
    from benchmarks.model_cases import MODELS, Case
    from benchmarks.photos import photos, thresholds_keeping
    from benchmarks.plot import plot
    from benchmarks.segmentors import segmentor_candidates
    from benchmarks.table import Row, Setting, read_csv, rows_of, table, write_csv
    from shared.machine_and_versions import environment
    from shared.option_types import device, number

SCOPES: dict[str, Callable[[Case], list[Candidate]]] = {
    "backbone": backbone_candidates,
    "pyramid": pyramid_candidates,
    "detector": detector_candidates,
    "segmentor": segmentor_candidates,
    "linear": partial(segmentor_candidates, head="linear"),
}
PATCH_SIZE = 16


def settings(options: argparse.Namespace) -> list[Setting]:
    """List every comparison that was asked for."""
    said = [f"thresholds {' '.join(f'{t:g}' for t in options.thresholds)}", f"rounds {options.rounds}"]
    said += [f"keep {options.keep:g}"] if options.keep is not None else []
    said += [f"budget {options.budget:g}"] if options.budget is not None else []
    said += ["compile"] if options.compile else []
    around = (options.dtype, ", ".join(said), environment(torch.device(options.device)))
    return [
        Setting(scope, options.model, step, size, batch, *around)
        for scope, size, batch, step in product(options.scope, options.sizes, options.batches, options.steps)
    ]


@cache
def thresholds_at(size: int, batch: int, thresholds: tuple[float, ...], keep: float | None) -> tuple[float, ...]:
    """The thresholds, scaled to the share of tokens that is to be kept, if one is given."""
    return thresholds if keep is None else thresholds_keeping(keep, photos(size, batch), thresholds)


def compare(setting: Setting, options: argparse.Namespace) -> list[Row]:
    """Measure all variants at one setting."""
    device = torch.device(options.device)
    images = photos(setting.size, setting.batch)
    thresholds = thresholds_at(setting.size, setting.batch, tuple(options.thresholds), options.keep)
    if options.compile:
        torch.compiler.reset()  # what was compiled for other sizes counts against a limit
    case = Case(
        setting.model, images.to(device), thresholds, options.budget, setting.step == "training", options.compile
    )
    candidates = [c for c in SCOPES[setting.scope](case) if c.role not in options.skip]
    way = Way(setting.step, device, getattr(torch, setting.dtype))
    label = f"{setting.scope}, {setting.step}, {setting.batch} x {setting.size}"
    return rows_of(setting, measure(candidates, way, options.rounds, label), thresholds)


def measure_all(wanted: Sequence[Setting], rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Measure all settings but those of ``rows``, which an earlier run measured; return the rows of both.

    With ``--csv``, the rows so far are kept next to that file after each setting.
    """
    rows = list(rows)
    for setting in tqdm([s for s in wanted if s not in {row.setting for row in rows}], "settings"):
        rows += compare(setting, options)
        if options.csv:
            write_csv(rows, partial_of(options.csv))
    return rows


def partial_of(path: Path) -> Path:
    """Return where the rows of an unfinished run are."""
    return path.with_name(path.name + ".partial")


def earlier_rows(options: argparse.Namespace) -> list[Row]:
    """Read the rows that ``--resume`` starts from.

    Raises:
        ValueError: if an interrupted run would be overwritten, or its file cannot be read.
    """
    if options.csv is None:
        return []
    partial = partial_of(options.csv)
    if options.resume:
        found = next((path for path in (partial, options.csv) if path.exists()), None)
        return read_csv(found) if found else []
    if partial.exists():
        raise ValueError(f"{partial} holds the rows of an interrupted run; pass --resume to continue, or delete it")
    return []


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options out of range."""
    if options.model not in MODELS:
        raise ValueError(f"--model {options.model!r} is unknown; expected one of {', '.join(MODELS)}")
    bad = [size for size in options.sizes if size < PATCH_SIZE or size % PATCH_SIZE]
    if bad:
        raise ValueError(f"--sizes {bad}: expected multiples of {PATCH_SIZE}, the pixels of a patch")
    for name, low in (("rounds", [options.rounds]), ("batches", options.batches)):
        if min(low) < 1:
            raise ValueError(f"--{name} {min(low)}: expected at least 1")
    for name in ("keep", "budget"):
        share = getattr(options, name)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"--{name} {share}: expected a share of all tokens, above 0 and at most 1")
    if options.compile and options.scope != ["backbone"]:
        raise ValueError(f"--compile is for --scope backbone only, not {' '.join(options.scope)}")
    if options.resume and options.csv is None:
        raise ValueError("--resume needs --csv, which says what was measured already")
    for size, batch in product(options.sizes, options.batches):
        thresholds_at(size, batch, tuple(options.thresholds), options.keep)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vitdet-b", help=f"{', '.join(MODELS)} (default: vitdet-b)")
    add("--scope", nargs="+", choices=SCOPES, default=["backbone"], help="one or several (default: backbone)")
    add(
        "--sizes",
        type=int,
        nargs="+",
        default=[1024],
        help="sides of the square photos, pixels (default: 1024)",
    )
    add("--batches", type=int, nargs="+", default=[1], help="photos per step (default: 1)")
    add("--steps", nargs="+", choices=["inference", "training"], default=["inference"])
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="autocast, if not float32")
    add("--thresholds", type=number(), nargs="+", default=[5.5, 4.0], help="bits (default: 5.5 4)")
    add("--keep", type=float, help="scale the thresholds so that this share of tokens is kept")
    add("--budget", type=float, help="add a variant with this share of tokens in every image (token_budget)")
    add("--compile", action="store_true", help="compile backbones, ours and the baselines', in inference")
    add(
        "--skip",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="leave out the baselines of timm, mmseg or detectron2, or the cheap ones",
    )
    add("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--csv", type=Path, help="write the rows there")
    add("--resume", action="store_true", help="skip the settings that --csv has already, failed ones included")
    add("--plot", type=Path, help="draw time and memory against size there (PNG)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        check(options)
        rows = earlier_rows(options)
    except ValueError as error:
        raise SystemExit(f"benchmark.py: {error}") from error
    rows = measure_all(settings(options), rows, options)
    print(table(rows))
    if options.csv:
        write_csv(rows, partial_of(options.csv))
        partial_of(options.csv).replace(options.csv)
    if options.plot and any(row.seconds is not None for row in rows):
        plot(rows, options.plot)


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs its own steps
    with needed_packages("benchmark"):
        shared.interrupts.run(main)
