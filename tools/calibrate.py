"""Find thresholds with which your photos keep the share of tokens that you want.

    python tools/calibrate.py my_photos/ --out calibration/ --tokens 0.6
    python tools/calibrate.py ade/images/training --out calibration/ --tokens-of-95 0.8 --square 512 --photos 2000
    python tools/calibrate.py my_photos/ --out calibration/ --milliseconds 400 --model base --square 1024
    python tools/calibrate.py my_photos/ --out calibration/ --images-per-second 2 --config my_config.py --square 512
    python tools/calibrate.py my_photos/ --out calibration/ --masks my_masks/ --mixed 0.3
    python tools/calibrate.py --coco data/raccoons --out calibration/ --mixed 0.3 --size 1024
    python tools/calibrate.py --pipeline CONFIG --data-root DIR --out pipeline/
    python tools/calibrate.py --pipeline CONFIG --data-root DIR --out calibration/ --tokens 0.6

Photos are measured in their own sizes unless --size, --square or --config says in which one the model sees them: the
same scene keeps fewer tokens the more pixels it has. Thresholds do not carry over between data sets, either: at the
same ones, a portrait keeps half of its tokens and a meadow nearly all. The thresholds given (--thresholds, or those of
--config) are scaled by one factor, found from the scores of all photos in one pass. OUT then holds

- thresholds.json: thresholds, shares of tokens (mean, 5, 50 and 95 % of the photos), area by patch size, and what to
  expect of other photos of the same kind;
- snippets.md: what to write into the configs of each host;
- with --masks: which share of the coarse patches holds more than one class, and of the borders between classes lies
  under coarse patches, there and in labels.png, against the tokens kept. By it thresholds and scorers can be compared
  before anything is trained. With --coco, the same of objects (boxes, where there are no masks), and which share of the
  small ones (at most 32 x 32 pixels) lies under coarse patches for half of their cells or more;
- tokens.json: the tokens of each photo, for tools/simulate_scaling.py;
- histogram.png and worst.png: how the shares spread, and the photos that keep most tokens;
- curves.jsonl: what was measured of each photo, from which the same command continues after an interruption.

--pipeline takes photos as the training pipeline of an MMSegmentation config draws them, padded: the config's own
images, or photos given, whose masks are then of one class. With a target, thresholds are those with which training
meets it. Without, it shows what augmentation costs: the tokens kept after each transform. OUT then holds a table,
pipeline.md, and pipeline.png.

An input is a photo, or a folder, whose photos and those of its subfolders are taken. Photos that cannot be read are
counted and named; they do not stop the run.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("calibrate"):
    import numpy as np
    from visualize import config_scale, read_config, selector_of

    from apt_dense.hosts.token_counts import write_counts
    from apt_dense.patches.calibration import Calibration, CurveStatistics, Target, scalable
    from apt_dense.weights.files import write_text_whole

    from calibration.calibrate_options import parse
    from calibration.curve_record import read_curves
    from calibration.labels_under_coarse_patches import HiddenLabels, draw_hidden, hidden_labels
    from calibration.masks_of_photos import find_masks
    from calibration.report import describe, draw_histogram, draw_worst, shares_at, snippets
    from calibration.thresholds_for_latency import find_thresholds
    from calibration.token_curves import Sizes, Source, measure_curves
    from shared.photo_files import evenly_spread, find_photos
    from shared.thresholds_for_share import short

NAMED = 10  # unreadable photos that are named
PIPELINE_PHOTOS = 100  # that go through a pipeline, unless --photos says otherwise


def target_of(options: argparse.Namespace, hidden: HiddenLabels | None = None) -> Target:
    """Return the share to reach. Raises ValueError."""
    if options.mixed is not None:
        if options.masks is None and options.coco is None:
            raise ValueError("--mixed needs --masks, the folder of the photos' labels, or --coco")
        return Target(1.0 if hidden is None else share_with_mixed(hidden, options.mixed))
    if options.tokens_of_95 is not None:
        return Target(options.tokens_of_95, quantile=0.95)
    if options.tokens_per_image is not None:
        if options.square is None:
            raise ValueError("--tokens-per-image needs photos of one size: give --square, the model's input size")
        return Target(options.tokens_per_image / (-(-options.square // options.patch_size)) ** 2)
    return Target(options.tokens)


def settings_of(photos: Sequence[Path | str], source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """Return everything that the curves depend on."""
    selector = source.selector
    patches = {name: getattr(selector, name) for name in ("thresholds", "scorer", "patch_size", "window_size")}
    pixels = {name: getattr(selector, name) for name in ("pixel_mean", "pixel_std", "channel_order")}
    names = hashlib.sha256("\n".join(map(str, photos)).encode()).hexdigest()[:12]
    labels = {"masks": str(options.masks)} | ({"coco": str(options.coco)} if options.coco else {})
    labels |= {"void": sorted(options.void)} if options.void else {}
    drawn = {"pipeline": source.drawn.describe()} if source.drawn is not None else {}
    named = {"photos": f"{len(photos)}, names {names}"}
    return {**patches, **pixels, **source.sizes._asdict(), **named, **labels, **drawn}


def photos_and_source(options: argparse.Namespace) -> tuple[Sequence[Path | str], Source]:
    """Return what to measure, and how. Raises ValueError, TypeError, OSError."""
    if options.pipeline is not None:
        task, draw_photos = _task(options)
        drawn = draw_photos(task, options.draws, options.seed)
        return list(drawn.numbers), Source(task.pipeline.selector, Sizes(), {}, drawn=drawn)
    cfg = read_config(options.config) if options.config else None
    selector, sizes = selector_of(options, cfg), sizes_of(options, cfg)
    if not selector.thresholds:
        raise ValueError("--thresholds is empty: there is nothing to scale; give one per coarse patch size")
    if options.coco is not None:
        with needed_packages("calibrate"):
            from calibration.objects_of_photos import read_objects_of
        objects = read_objects_of(options.coco, options.photos)
        return list(objects.ids), Source(selector, sizes, {}, objects=objects)
    photos = evenly_spread(find_photos(options.inputs, subfolders=True), options.photos)
    masks = find_masks(photos, options.masks) if options.masks else {}
    return photos, Source(selector, sizes, masks, options.void)


def sizes_of(options: argparse.Namespace, cfg: Mapping[str, Any] | None) -> Sizes:
    """Return the size that is asked for, or else the one in which the config's model is tested."""
    if options.size or options.square or cfg is None:
        return Sizes(options.size, options.square)
    return Sizes(within=config_scale(cfg))


def calibrate(options: argparse.Namespace) -> Calibration:
    """Measure the curves, choose thresholds, write the report. Raises ValueError, TypeError, OSError."""
    photos, source = photos_and_source(options)
    selector = source.selector
    scalable(selector.thresholds)
    options.patch_size = selector.patch_size
    if options.milliseconds is None:
        target_of(options)  # before anything is measured
    options.out.mkdir(parents=True, exist_ok=True)
    record, settings = options.out / "curves.jsonl", settings_of(photos, source, options)
    if options.force:
        record.unlink(missing_ok=True)
    measure_curves(photos, source, options.workers, record, settings)
    statistics, unreadable = CurveStatistics(selector.num_scales), []
    for curve in read_curves(record, settings):
        if curve.patches is None:
            unreadable.append(curve)
        else:
            statistics.add(curve.patches, curve.cells)
    report_left_out([curve.error for curve in unreadable])
    hidden = hidden_labels(read_curves(record, settings)) if source.is_labelled else None
    if options.milliseconds is not None:
        found = find_thresholds(options, statistics, selector, photos, source.sizes)
    else:
        found = statistics.calibrate(selector.thresholds, target_of(options, hidden))
    if source.drawn is not None:
        found = with_draws(found, options.draws)
    write_report(options.out, found, source, record, settings)
    if hidden is not None:
        write_hidden(options.out, hidden, found)
    return found


def with_draws(found: Calibration, draws: int) -> Calibration:
    """Widen the interval of what to expect, as if all draws of a photo were the same: they tell nothing of others."""
    low, high = (found.share + (end - found.share) * draws**0.5 for end in found.expected)
    return replace(found, expected=(max(low, 0.0), min(high, 1.0)))


def share_with_mixed(hidden: HiddenLabels, most: float) -> float:
    """Return the smallest share of tokens with at most that share of mixed coarse patches. Raises ValueError."""
    good = np.nan_to_num(hidden.mixed) <= most
    if not good.any():
        raise ValueError(f"--mixed {most:g} is not reached: at least {np.nanmin(hidden.mixed):.1%} are mixed")
    return float(hidden.tokens[good].min())


def write_hidden(out: Path, hidden: HiddenLabels, found: Calibration) -> None:
    """Add what the masks say to the results."""
    draw_hidden(out / "labels.png", hidden, found.factor)
    at = hidden.at(found.factor)
    content = json.loads((out / "thresholds.json").read_text(encoding="utf-8"))
    small = {"small_objects": at["small"]} if np.isfinite(hidden.small).any() else {}
    content["labels"] = {"mixed": at["mixed"], "border": at["border"], **small}
    write_text_whole(out / "thresholds.json", json.dumps(content, indent=1) + "\n")
    print(f"labels: {at['mixed']:.1%} of the coarse patches hold several classes; {at['border']:.1%} of the pixels on")
    print("borders between classes lie under coarse patches")
    for share in small.values():
        print(f"{share:.1%} of the small objects lie under coarse patches for half of their cells or more")


def report_left_out(reasons: Sequence[str]) -> None:
    """Name the photos that could not be used."""
    for reason in reasons[:NAMED]:
        print(f"calibrate: left out: {reason}", file=sys.stderr)
    if len(reasons) > NAMED:
        print(f"calibrate: left out: {len(reasons) - NAMED} more", file=sys.stderr)


def write_report(out: Path, found: Calibration, source: Source, record: Path, settings: dict[str, Any]) -> None:
    """Write what the module's text lists."""
    chosen = replace(source.selector, thresholds=tuple(float(short(t)) for t in found.thresholds))
    shares = shares_at(read_curves(record, settings), found.factor)
    write_counts(out / "tokens.json", shares.tokens, {**settings, "thresholds": chosen.thresholds})
    draw_histogram(out / "histogram.png", shares.all, found)
    draw_worst(out / "worst.png", shares.worst, chosen, source)
    write_text_whole(out / "snippets.md", snippets(chosen, found.share) + "\n")
    content = {**asdict(found), "thresholds": chosen.thresholds, "settings": settings}
    write_text_whole(out / "thresholds.json", json.dumps(content, indent=1) + "\n")
    print(describe(found, source.selector.patch_size, source.drawn is not None))
    if source.sizes == Sizes() and source.drawn is None:
        print("measured in the photos' own sizes; name the size that the model sees with --size, --square or --config")
    print(f"{out}/snippets.md has the lines for your config; look at {out}/worst.png and {out}/histogram.png")


def _task(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the training pipeline with its photos, and what names their draws. Raises ValueError, OSError."""
    with needed_packages("calibrate"):
        from calibration.drawn_photos import draw_photos
        from calibration.training_pipeline import read_task
    options.photos = options.photos or PIPELINE_PHOTOS
    return read_task(options, evenly_spread(find_photos(options.inputs, subfolders=True), options.photos)), draw_photos


def show_pipeline(options: argparse.Namespace) -> None:
    """Measure what each transform of a training pipeline does to the tokens. Raises ValueError, TypeError, OSError."""
    task, _ = _task(options)
    from calibration.pipeline_report import describe_pipeline, draw_pipeline, rows_of
    from calibration.tokens_after_each_transform import measure_pipeline

    options.out.mkdir(parents=True, exist_ok=True)
    found = measure_pipeline(task.pipeline, task.photos, options.draws, options.seed, options.workers)
    report_left_out(found.left_out)
    text = describe_pipeline(task.pipeline, found, len(task.photos))
    if options.inputs:
        text += "\n\nThe photos were given without masks: steps that look at labels saw one class everywhere."
    draw_pipeline(options.out / "pipeline.png", rows_of(task.pipeline.names, found))
    head = f"# Tokens after each transform of {options.pipeline}\n\nSeed {options.seed}.\n\n![](pipeline.png)\n\n"
    write_text_whole(options.out / "pipeline.md", f"{head}{text}\n")
    print(f"{text}\n\n{options.out}/pipeline.md has this table, {options.out}/pipeline.png draws it")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv, __doc__)
    try:
        calibrate(options) if options.has_target else show_pipeline(options)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"calibrate: {error}")


if __name__ == "__main__":
    with needed_packages("calibrate"):
        shared.interrupts.run(main)
