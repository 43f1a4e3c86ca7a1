"""Convert annotations of Pascal VOC or YOLO to COCO's JSON files, which the detection tools train on.

    python tools/convert_annotations.py voc data/raccoons --val-share 0.2     # XML files and pictures
    python tools/convert_annotations.py yolo data/coco128/data.yaml           # text files of boxes or polygons

DATA/annotations/instances_train.json and instances_val.json (or below --out DIR) then name the pictures where they are.
Train with: python tools/train_det_torchvision.py DATA --out runs/det

Splits are those of folders (train, val or valid, test), of VOC's ImageSets/Main or of data.yaml; --val-share makes them
where there are none. An entry that cannot be converted is named by its file, and nothing is written, unless
--leave-out-corrupt is given. All else that is not taken as it is written is counted.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.log_on_terminal import show_log
from shared.packages import needed_packages

with needed_packages("convert_annotations"):
    from annotation_formats.coco_instances import Written, annotation_files, write_splits
    from annotation_formats.labelled_pictures import UNLABELLED, Findings, Picture
    from annotation_formats.pascal_voc_xml import VocOptions, read_voc
    from annotation_formats.yolo_txt import read_yolo

SHOWN = 20  # problems in a message


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = parser.add_subparsers(dest="format", required=True, metavar="{voc,yolo}")
    voc = formats.add_parser("voc", help="Pascal VOC: an XML file a picture")
    yolo = formats.add_parser("yolo", help="YOLO: a text file a picture, with boxes or polygons")
    voc.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    yolo.add_argument("data", type=Path, metavar="DATA", help="data.yaml, or the folder of the data set")
    voc.add_argument("--images", type=Path, help="folder of the pictures (default: DATA/JPEGImages, images or DATA)")
    voc.add_argument("--annotations", type=Path, help="folder of XML files (default: DATA/Annotations or DATA)")
    voc.add_argument(
        "--first-pixel", type=int, choices=(0, 1), default=1,
        help="number of the first row and column: 1 in Pascal VOC (the default), 0 in what some programs write",
    )  # fmt: skip
    voc.add_argument(
        "--ignore-difficult", action="store_true", help="neither learn nor score objects that are marked as difficult"
    )
    for one in (voc, yolo):
        _add_common(one)
    return parser.parse_args(argv)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder that gets annotations/ (default: DATA)")
    parser.add_argument("--val-share", type=float, metavar="S", help="share of the pictures for validation, 0 to 1")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes in order, one a line")
    parser.add_argument(
        "--unlabelled", choices=UNLABELLED, default="error",
        help="what a picture without a file of labels is: an error (the default), one without objects, or left out",
    )  # fmt: skip
    parser.add_argument(
        "--leave-out-corrupt", action="store_true", help="convert the rest where entries cannot be converted"
    )
    parser.add_argument(
        "--box-outlines", action="store_true", help="give objects without an outline their box as one, for Mask R-CNN"
    )
    parser.add_argument("--force", action="store_true", help="replace annotation files that exist")


def read(args: argparse.Namespace, findings: Findings) -> tuple[dict[str, list[Picture]], list[str]]:
    """Read the splits and the names of the classes. Raises FileNotFoundError, ValueError."""
    if not args.data.exists():
        raise FileNotFoundError(f"{args.data} does not exist")
    names = _read_names(args.classes) if args.classes else None
    if args.format == "yolo":
        return read_yolo(args.data, names, args.unlabelled, args.val_share, findings)
    options = VocOptions(args.images, args.annotations, args.first_pixel, args.ignore_difficult, args.unlabelled)
    splits = read_voc(args.data, options, args.val_share, findings)
    objects = [entry for pictures in splits.values() for picture in pictures for entry in picture.objects]
    if names is None:
        return splits, sorted({entry.name for entry in objects})
    for entry in objects:
        if entry.name not in names:
            findings.problem(entry.where, f"{args.classes} does not list its class")
    known = {split: [picture._replace(objects=[entry for entry in picture.objects if entry.name in names])
                     for picture in pictures] for split, pictures in splits.items()}  # fmt: skip
    return known, names


def _read_names(path: Path) -> list[str]:
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path} holds {len(names)} names; expected at least one, and each only once")
    return names


def report(findings: Findings, leave_out: bool) -> None:
    """Print what was not taken as it is written. Raises ValueError for entries that cannot be converted."""
    for note, places in findings.notes.items():
        print(f"{len(places)} times: {note}; the first: {places[0]}", file=sys.stderr)
    count = len(findings.problems)
    shown = findings.problems if leave_out else findings.problems[:SHOWN]
    for problem in shown:
        print(f"{'left out: ' if leave_out else ''}{problem}", file=sys.stderr)
    if count and not leave_out:
        more = f", of which {SHOWN} are shown" if count > SHOWN else ""
        raise ValueError(
            f"{count} entries cannot be converted, see above{more}; correct them, or add --leave-out-corrupt to "
            f"convert the rest. Nothing was written"
        )


def convert(args: argparse.Namespace) -> list[Written]:
    """Convert a data set. Raises FileNotFoundError, ValueError, OSError."""
    out, findings = args.out or (args.data.parent if args.data.is_file() else args.data), Findings()
    splits, names = read(args, findings)
    report(findings, args.leave_out_corrupt)
    present = [str(path) for path in annotation_files(out, list(splits)).values() if path.exists()]
    if present and not args.force:
        raise ValueError(f"{', '.join(present)} exist already; add --force to replace them, or choose another --out")
    return write_splits(splits, names, out, args.box_outlines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    show_log()
    try:
        written = convert(args)
    except (OSError, ValueError) as error:
        sys.exit(f"convert_annotations: {error}")
    for one in written:
        print(one)


if __name__ == "__main__":
    shared.interrupts.run(main)
