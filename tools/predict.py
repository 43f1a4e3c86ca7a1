"""Run a trained model on photos: what it finds as pictures and as data, with the tokens and the time of each photo.

    python tools/predict.py runs/det photo.jpg --out found/
    python tools/predict.py work_dirs/upernet_apt_vit-b16_160k_ade20k-512x512 my_photos/ --out found/
    python tools/predict.py output/model_final.pth my_photos/ --out found/ --score-threshold 0.3

MODEL is the folder of a run, or a checkpoint in it, of tools/train_det_torchvision.py, tools/train_seg.py or
tools/train_det.py (or Detectron2's DefaultTrainer). A folder of photos stands for those directly in it. OUT gets

    of a detector   NAME.png with boxes, masks, classes and scores, and detections.json in COCO's layout
    of a segmentor  NAME.png with the classes painted over, NAME_labels.png with the number of each pixel's class, and
                    predictions.json with the classes and their numbers

category_id is that of the annotation file that the model was trained with, or 1, 2, ... where the run does not tell.
Label maps count classes from 0: with a classes.txt in its order, so that masks of 0 and 255 become 0 and 1. Data sets
with reduce_zero_label, as ADE20K, count from 1, as in their masks.

Both JSON files list each photo with its size, tokens kept and milliseconds; the first photo also pays for the start of
the libraries. A photo that cannot be read is named and left out; the others are still done, and the exit status is 1.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.log_on_terminal import quiet, show_log
from shared.packages import needed_packages

with needed_packages("predict"):
    from tqdm import tqdm

    from apt_dense.hosts.load_trained import load_trained
    from apt_dense.hosts.trained_model_types import SCORE_THRESHOLD, TrainedDetector
    from apt_dense.weights.files import write_text_whole

    from prediction.output_files import DetectorOutput, Output, SegmentorOutput
    from shared.option_types import device
    from shared.photo_files import check_outputs, find_photos, name_outputs, read_photo
    from shared.token_counts import TokenCounter


def run(args: argparse.Namespace) -> tuple[int, int]:
    """Do what the command line asks for; return how many photos there were and how many could be read."""
    photos = find_photos(args.inputs)
    bases = [args.out / name for name in name_outputs(photos)]
    with quiet():
        model = load_trained(args.model, args.config, args.device)
    if isinstance(model, TrainedDetector):
        output = DetectorOutput(model, not args.no_pictures, args.score_threshold)
    else:
        output = SegmentorOutput(model, not args.no_pictures)
    json_path = args.out / output.json_name
    files = [path for base in bases for path in output.files(base)]
    check_outputs(photos, [json_path, *files], args.overwrite)
    images: list[dict[str, Any]] = []
    try:
        predict_all(photos, bases, output, images)
    finally:
        if images:  # also of a run that is stopped
            write_text_whole(json_path, json.dumps(output.content(images), indent=1) + "\n")
    if images:
        kept = statistics.mean(image["tokens_kept"] for image in images)
        middle = statistics.median(image["milliseconds"] for image in images)
        print(f"{len(images)} of {len(photos)} photos in {args.out}: tokens kept {kept:.0%}, {middle:.0f} ms a photo")
    return len(photos), len(images)


def predict_all(photos: Sequence[Path], bases: Sequence[Path], output: Output, images: list[dict[str, Any]]) -> None:
    """Write what the model finds in each photo, and add its entry to ``images``; name photos that cannot be read."""
    counter = TokenCounter(output.model.backbone)
    for photo, base in zip(tqdm(photos, "predicting", unit="photo"), bases, strict=True):
        try:
            pixels = read_photo(photo)
        except (ValueError, OSError) as error:
            tqdm.write(f"predict: left out: {error}", file=sys.stderr)
            continue
        start = time.perf_counter()
        found = output.predict(pixels)
        seconds = time.perf_counter() - start
        tokens, cells = counter.take_counts()
        image = {"id": len(images) + 1, "file_name": str(photo), "height": pixels.shape[0], "width": pixels.shape[1]}
        image |= {"tokens": tokens, "cells": cells, "tokens_kept": round(tokens / cells, 4)}
        image["milliseconds"] = round(1000 * seconds, 1)
        base.parent.mkdir(parents=True, exist_ok=True)
        output.write(base, pixels, found, image)
        images.append(image)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a run, or a checkpoint in it")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="photo, or folder of photos")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument(
        "--score-threshold", type=float, default=SCORE_THRESHOLD, metavar="S",
        help="lowest score of a detection, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-pictures", action="store_true", help="write data only")
    parser.add_argument("--overwrite", action="store_true", help="replace files in OUT")
    parser.add_argument("--device", type=device, help="default: a GPU if there is one")
    parser.add_argument("--config", help="config of the model, where its checkpoint brings none; it is run")
    args = parser.parse_args(argv)
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: expected 0 to 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    show_log()
    try:
        with needed_packages("predict"):
            photos, read = run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"predict: {' '.join(str(error).split())}")
    if read < photos:
        sys.exit(f"predict: {photos - read} of {photos} photos could not be read, see above")


if __name__ == "__main__":
    shared.interrupts.run(main)
