"""Write a page about the patches of your photos, to look at and to show.

    python tools/report.py my_photos/ --out report/
    python tools/report.py my_photos/ --out report/ --calibration calibrated/ --masks my_masks/
    python tools/report.py my_photos/ --out report/ --config configs/mmseg/own_data_hundreds.py --measure small

OUT/report.html is one file that loads nothing and runs no scripts: send it, or open it on a phone. It shows

- how many tokens photos keep: mean, spread, a histogram, patches by size, and what other thresholds would keep;
- the speed-up that this promises, by the operations of plain ViTs; with --measure, times on this machine;
- with --masks, which share of the coarse patches holds several classes; with --quality, the figures of an evaluation;
- photos with their patches and scores, from those that keep most tokens to those that keep fewest.

All figures stand in tables, too. Thresholds are those of --thresholds, --config, or of a folder of tools/calibrate.py
(--calibration, which brings the size of the photos, and what it expected). Photos keep their size unless one of these
or --size or --square says otherwise: the same scene keeps fewer tokens the more pixels it has.

An input is a photo, or a folder, whose photos and those of its subfolders are taken. Photos that cannot be read are
named on the page and left out, and the exit status is 1.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("report"):
    import tqdm  # before what asks for it by another tool's name
    from calibrate import sizes_of
    from visualize import read_config, selector_of

    from apt_dense.weights.files import write_text_whole

    from calibration.masks_of_photos import find_masks
    from calibration.token_curves import Source
    from reporting.given_files import read_calibration, read_quality, source_of
    from reporting.html_elements import Markup, printable
    from reporting.measured_speed import measure_speed
    from reporting.page import build_page
    from reporting.photo_card import photo_card
    from reporting.photo_figures import PhotoFigures, PhotoLeftOut, measure_photos, read_picture, summarise
    from reporting.predicted_speed import MODELS
    from reporting.report_content import Report
    from shared.argument_files import command_line
    from shared.option_types import PIXELS, SCORER_HELP, share_or_count, whole
    from shared.photo_files import evenly_spread, find_photos

PAGE = "report.html"
DRAWN = 8
COUNTS = "token_budget", "min_tokens"  # options of a config's backbone that decide how many tokens there are


def choose_source(args: argparse.Namespace, calibration: Mapping[str, Any] | None) -> Source:
    """Return how photos are read and cut: as the calibration or the config says, except where options say otherwise.

    Raises:
        ValueError, TypeError: for options that contradict each other or are out of range.
    """
    cfg = read_config(args.config) if args.config else None
    source = Source(selector_of(args, cfg), sizes_of(args, cfg), {}) if calibration is None else source_of(calibration)
    backbone = {} if cfg is None else cfg["model"]["backbone"]
    more = {name: backbone[name] for name in COUNTS if name in backbone}
    if args.budget is not None:
        more = {"token_budget": args.budget, "min_tokens": None}
    return source._replace(selector=replace(source.selector, **more))


def measure(paths: Sequence[Path], source: Source) -> tuple[list[PhotoFigures], list[PhotoLeftOut]]:
    """Cut all photos into patches; the first are those that keep most tokens."""
    found: list[PhotoFigures] = []
    left_out: list[PhotoLeftOut] = []
    for each in tqdm.tqdm(measure_photos(paths, source), "photos", total=len(paths), unit="photo"):
        if isinstance(each, PhotoFigures):
            found.append(each)
        else:
            left_out.append(each)
            tqdm.tqdm.write(f"report: left out: {each.reason}", file=sys.stderr)
    if not found:
        raise ValueError(f"none of {len(left_out)} photos can be read")
    return sorted(found, key=lambda photo: -photo.share), left_out


def spread(photos: Sequence[PhotoFigures], most: int) -> list[PhotoFigures]:
    """Take at most so many photos at even distances, the first and the last among them."""
    if len(photos) <= most:
        return list(photos)
    return [photos[round(number * (len(photos) - 1) / max(most - 1, 1))] for number in range(most)]


def draw(photos: Sequence[PhotoFigures], names: Mapping[Path, str], source: Source, model: str) -> list[Markup]:
    """Build the parts of the page with pictures."""
    cards = []
    for number, photo in enumerate(tqdm.tqdm(photos, "drawing", unit="photo"), start=1):
        picture = read_picture(photo.path, source)
        cards.append(photo_card(number, names[photo.path], picture, photo, (source.selector, model)))
    return cards


def report(args: argparse.Namespace, command: str) -> Report:
    """Measure and draw everything, and write the page. Raises ValueError, TypeError, OSError."""
    calibration = None if args.calibration is None else read_calibration(args.calibration)
    quality = None if args.quality is None else read_quality(args.quality)
    source = choose_source(args, calibration)
    paths = evenly_spread(find_photos(args.inputs, subfolders=True), args.photos)
    if args.masks is not None:
        source = source._replace(masks=find_masks(paths, args.masks), void=args.void)
    args.out.mkdir(parents=True, exist_ok=True)
    photos, left_out = measure(paths, source)
    names = {photo.path: name for photo, name in zip(photos, name_photos(photos), strict=True)}
    measured = measure_speed(args.measure, [photo.path for photo in photos], source) if args.measure else None
    content = Report(command, source, photos, left_out, summarise(photos), names, (), measured, calibration, quality)
    content = content._replace(cards=draw(spread(photos, args.drawn), names, source, content.model))
    write_text_whole(args.out / PAGE, build_page(content))
    return content


def name_photos(photos: Sequence[PhotoFigures]) -> list[str]:
    """Name photos on the page: by their files, or with as much of their path as tells them apart."""
    paths = [photo.path for photo in photos]
    names = [path.name for path in paths]
    return [printable(name if names.count(name) == 1 else str(path)) for name, path in zip(names, paths, strict=True)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="photo, or folder of photos")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder of the page, {PAGE}; one there is replaced")
    add("--thresholds", type=float, nargs="*", metavar="T", help="for patches of 2, 4, ... times the patch size")
    add("--scorer", metavar="NAME|FILE", help=SCORER_HELP)
    add("--patch-size", type=whole(1, PIXELS), metavar="P", help="pixels of the smallest patches (default: 16)")
    add(
        "--budget",
        type=share_or_count,
        metavar="SHARE|N",
        help="tokens of each photo, instead of what thresholds leave",
    )
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--config", type=Path, help="MMSeg config whose backbone's settings, and test size, are taken")
    origin.add_argument(
        "--calibration", type=Path, metavar="DIR", help="folder of tools/calibrate.py, for its thresholds"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=whole(1, PIXELS), metavar="N", help="resize the longer side to N pixels first")
    size.add_argument("--square", type=whole(1, PIXELS), metavar="N", help="cut the middle square, resized to N pixels")
    add("--masks", type=Path, metavar="DIR", help="labels of the photos, PNG files of the same names; 255 is no class")
    add("--void", type=int, nargs="+", default=[], metavar="N", help="other values of the masks that are no class")
    add("--measure", choices=MODELS, metavar="SIZE", help=f"time a ViT of that size here: {', '.join(MODELS)}")
    add(
        "--quality",
        type=Path,
        metavar="FILE",
        help="figures of an evaluation: the JSON file of eval_seg.py --by-scale, or another",
    )
    add("--photos", type=whole(1), metavar="N", help="at most N photos, at even distances in their order")
    add("--drawn", type=whole(0), default=DRAWN, metavar="N", help="photos with pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    own = [name for name in ("thresholds", "scorer", "patch_size", "size", "square") if getattr(args, name) is not None]
    if args.calibration is not None and own:
        parser.error(f"--{own[0].replace('_', '-')} contradicts --calibration, which brings it; give one of them")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    command = command_line("report", argv)
    try:
        content = report(args, printable(command))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"report: {' '.join(str(error).split())}")
    kept = f"{content.summary.share:.1%} of the tokens kept on average"
    print(f"{args.out / PAGE}: {len(content.photos)} photos, {kept}, {len(content.cards)} drawn")
    if content.left_out:
        total = len(content.photos) + len(content.left_out)
        sys.exit(f"report: {len(content.left_out)} of {total} photos were left out, see above")


if __name__ == "__main__":
    with needed_packages("report"):
        shared.interrupts.run(main)
