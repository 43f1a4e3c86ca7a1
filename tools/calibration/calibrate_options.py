"""The command line of tools/calibrate.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from apt_dense.hosts.vit_sizes_and_windows import SIZES

from shared.option_types import PIXELS, SCORER_HELP, SEEDS, number, whole

TARGETS = "tokens", "tokens_of_95", "tokens_per_image", "milliseconds", "images_per_second", "mixed"


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the command line; end the tool where options make no sense, or do not go together."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", type=Path, nargs="*", metavar="INPUT", help="photo, or folder of photos")
    add("--out", type=Path, required=True, help="folder of the results")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--tokens", type=float, metavar="SHARE", help="mean share of tokens kept, such as 0.6")
    target.add_argument(
        "--tokens-of-95", type=float, metavar="SHARE", help="95 %% of the photos keep at most this share"
    )
    target.add_argument("--tokens-per-image", type=float, metavar="N", help="mean number of tokens; needs --square")
    target.add_argument(
        "--milliseconds",
        type=number(above=0),
        metavar="MS",
        help="mean time of a photo here, one at a time; needs --square",
    )
    target.add_argument(
        "--images-per-second", type=number(above=0), metavar="N", help="1000 / MS, in place of --milliseconds"
    )
    target.add_argument(
        "--mixed", type=float, metavar="SHARE", help="coarse patches with several classes; needs --masks or --coco"
    )
    add("--pipeline", type=Path, metavar="CONFIG", help="MMSeg config: photos as its training pipeline draws them; "
        "without a target, show the tokens after each of its transforms")  # fmt: skip
    add("--draws", type=whole(1), help="with --pipeline: draws of each photo (default: 4)")
    add("--seed", type=whole(0, SEEDS), help="with --pipeline: of the draws (default: 0)")
    add("--data-root", type=Path, metavar="DIR", help="with --pipeline: of the config's data")
    add("--masks", type=Path, metavar="DIR", help="labels of the photos, PNG files of the same names; 255 is no class")
    add(
        "--coco",
        type=Path,
        metavar="DATA",
        help="in place of INPUT and --masks, the training split of data in COCO's layout",
    )
    add("--void", type=int, nargs="+", default=[], metavar="N", help="other values of the masks that are no class")
    add(
        "--model",
        choices=SIZES,
        help="time a ViT of this size, alone (default: the config's whole model, or else base)",
    )
    add("--thresholds", type=float, nargs="+", metavar="T", help="those to scale (default: 5.5 4.0)")
    add("--scorer", metavar="NAME|FILE", help=SCORER_HELP)
    add("--patch-size", type=whole(1, PIXELS), metavar="P", help="pixels of the smallest patches (default: 16)")
    add("--config", type=Path, help="MMSeg config whose backbone's settings, and test size, replace these defaults")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=whole(1, PIXELS), metavar="N", help="resize the longer side to N pixels first")
    size.add_argument("--square", type=whole(1, PIXELS), metavar="N", help="cut the middle square, resized to N pixels")
    add("--photos", type=whole(1), metavar="N", help="at most N photos, at even distances in their order")
    add("--workers", type=whole(0), default=2, help="processes that read photos (default: %(default)s)")
    add("--force", action="store_true", help="measure all photos again")
    options = parser.parse_args(argv)
    _check_together(parser, options)
    return options


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the tool where options do not go together; fill in the time that a rate means."""
    options.has_target = any(getattr(options, name) is not None for name in TARGETS)
    if not options.has_target and options.pipeline is None:
        parser.error(f"one of the arguments --{' --'.join(TARGETS).replace('_', '-')} --pipeline is required")
    others = [name for name in TARGETS[2:] if getattr(options, name) is not None]
    if options.pipeline is not None and others:
        parser.error(f"--{others[0].replace('_', '-')} does not go with --pipeline, only --tokens and --tokens-of-95")
    if options.pipeline is None and options.coco is None and not options.inputs:
        parser.error("the following arguments are required: INPUT")
    if options.coco is not None and (options.inputs or options.masks or options.pipeline):
        parser.error("--coco brings photos and labels; give it without INPUT, --masks and --pipeline")
    others = [name for name in ("config", "masks", "size", "square") if getattr(options, name) is not None]
    if options.pipeline is not None and others:
        parser.error(f"--{others[0]} does not go with --pipeline, which says how photos are changed")
    needed = {"pipeline": ("draws", "seed", "data_root"), "masks": ("void",), "time": ("model",)}
    given = {
        "pipeline": options.pipeline,
        "masks": options.masks,
        "time": options.milliseconds or options.images_per_second,
    }
    for other, names in needed.items():
        alone = [name for name in names if getattr(options, name) not in (None, [])]
        if given[other] is None and alone:
            target = "--milliseconds" if other == "time" else f"--{other}"
            parser.error(f"--{alone[0].replace('_', '-')} has no effect without {target}")
    options.draws, options.seed = options.draws or 4, options.seed or 0
    if options.images_per_second is not None:
        options.milliseconds = 1000 / options.images_per_second
