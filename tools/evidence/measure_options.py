"""The options of measure_accuracy."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from evidence.equal_token_rows import parse_size
from evidence.model_forms import PLAIN, check_names, parse_form
from shared.argument_files import ArgumentParser
from shared.option_types import device, number, whole


def parse_args(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    features = kinds.add_parser("features", help="cosine to the uniform model's features, on any photos")
    features.add_argument("--model", required=True, metavar="NAME", help="a timm name")
    features.add_argument("--weights", type=Path, metavar="FILE", help="default: timm's, downloaded")
    features.add_argument("--block", type=whole(0), help="whose output is compared, from 0 (default: the last but one)")
    features.add_argument("--photos", type=Path, nargs="+", required=True, metavar="DIR", help="folders or files")
    labels = kinds.add_parser("labels", help="mIoU of a trained segmentor, on any labelled images")
    labels.add_argument("--config", type=Path, required=True, help="of MMSegmentation, with an APTViT")
    labels.add_argument("--checkpoint", type=Path, required=True, metavar="FILE")
    labels.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR")
    labels.add_argument("--masks", type=Path, nargs="+", required=True, metavar="DIR", help="PNG files, 8-bit labels")
    boxes = kinds.add_parser("boxes", help="AP of a trained detector, on any data set in COCO's layout")
    boxes.add_argument("--run", type=Path, required=True, help="folder or checkpoint of a run of any of the trainers")
    boxes.add_argument("--config", type=Path, metavar="FILE", help="of RUN, if it lacks one; executed as Python")
    boxes.add_argument("--coco", type=Path, required=True, metavar="DATA", help='its split "val" is tested on')
    boxes.add_argument(
        "--factors", dest="sizes", type=number(above=0), nargs="+", default=[1.0], metavar="F",
        help="of the size that the run's tests resize photos to (default: 1)",
    )  # fmt: skip
    for each in (features, labels):
        each.add_argument("--sizes", nargs="+", required=True, metavar="HxW", help="pixels, whole patches")
    for each in (features, labels, boxes):
        each.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="of the tokens")
        each.add_argument(
            "--thresholds", type=float, nargs="+", default=[5.5], help="their ratios (default: %(default)s)"
        )
        each.add_argument("--form", action="append", metavar="TEXT", help='"NAME" or "NAME: OPTION=VALUE, ..."')
        each.add_argument(
            "--times", action="store_true", help="show milliseconds of a forward pass; for quiet machines"
        )
        each.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
        each.add_argument("--limit", type=int, metavar="N", help="images at most, evenly spread")
        each.add_argument("--out", type=Path, required=True, help="folder of the results")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Turn text into values. Raises ValueError."""
    boxes = args.kind == "boxes"
    args.sizes = [(size, size) if boxes else parse_size(size) for size in args.sizes]
    args.forms = [parse_form(text) for text in args.form or [PLAIN]]
    check_names(args.forms)
    if not all(0 < share < 1 for share in args.shares):
        raise ValueError(f"--shares {args.shares}: expected numbers between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: expected 1 or more")
