"""Measure what adaptive patches cost in accuracy before anything is trained, next to a smaller image of as many tokens.

    python tools/measure_accuracy.py features --model vit_small_patch14_dinov2 --weights dinov2_s14.pth \\
        --photos my_photos --sizes 504x672 --form adaptive --form "half: proportional_attention=0.5" --out runs/features
    python tools/measure_accuracy.py labels --config CONFIG --checkpoint iter_1840.pth --sizes 364x476 \\
        --images data/camvid/images/testing --masks data/camvid/annotations/testing --out runs/labels
    python tools/measure_accuracy.py boxes --run runs/det --coco data/nuclei --form adaptive --out runs/boxes

"features" compares with the features of the uniform model after a block: mean cosine over cells and photos; those of a
smaller image are enlarged bilinearly. "labels" is the mIoU of a model of MMSegmentation, "boxes" the AP of a detector
of any of the trainers, both trained with or without adaptive patches, with the same weights. A form is a name and
options of APTViT. For each share of tokens, thresholds are scaled until all images together keep it, and a smaller
image has as many patches (for detectors, which pad images, about as many).

"@FILE" stands for the arguments in a file, as in configs/evidence, which has those of docs/EVIDENCE.md. OUT gets
rows.jsonl, table.csv, table.md, curves.png and arguments.args. Interrupted, the same command continues after the last
whole row. The figures do not change from run to run; times, in table.csv and with --times shown, do.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any

from shared.packages import needed_packages

with needed_packages("measure_accuracy"):
    import torch
    from tqdm import tqdm

    from apt_dense.weights.files import write_text_whole
    from apt_dense.weights.timm_arguments import create_timm_model

    from evidence.equal_token_rows import SMALLER, Case, cases, check_size, crossings
    from evidence.feature_similarity import load_model, measure, photo_at, reference_at
    from evidence.file_digest import digest, scorer_digest
    from evidence.labelled_photos import find_pairs
    from evidence.measure_options import check, parse_args
    from evidence.model_forms import Form
    from evidence.plot_accuracy_curves import plot
    from evidence.resumable_rows import KeptRows
    from shared.argument_files import command_line, record_arguments
    from shared.machine_and_versions import environment
    from shared.photo_files import evenly_spread, find_photos
    from shared.tables import markdown, write_csv

MEASURES = {"features": "cosine", "labels": "mIoU", "boxes": "AP"}
COLUMNS = {
    "size": "{}", "variant": "{}", "share": "{:.0%}", "tokens": "{:.1%}", "cosine": "{:.4f}", "least_cosine": "{:.4f}",
    "AP": "{:.2f}", "AP50": "{:.2f}", "APs": "{:.2f}", "APm": "{:.2f}", "APl": "{:.2f}", "mask AP": "{:.2f}",
    "mIoU": "{:.2f}", "boundary": "{:.2f}", "accuracy": "{:.2f}", "ms": "{:.1f}", "photos": "{}", "images": "{}",
}  # fmt: skip


def ratios_of(form: Form, args: argparse.Namespace) -> tuple[float, ...]:
    return tuple(form.options.get("thresholds", args.thresholds))


def settings_of(case: Case, common: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All that the results of a row depend on besides versions."""
    size = f"size x {case.size[0]:g}" if args.kind == "boxes" else f"{case.size[0]}x{case.size[1]}"
    settings = {**common, "size": size, "variant": case.variant, "share": case.share}
    if case.form is not None:
        settings |= {"form": case.form.text, "ratios": list(ratios_of(case.form, args))}
        scorer = scorer_digest(case.form.options.get("scorer"))
        settings |= {"scorer": scorer} if scorer else {}
    return settings


def features(args: argparse.Namespace, kept: KeptRows) -> Iterator[dict]:
    """The rows of the first table, made or found."""
    photos = evenly_spread(find_photos(args.photos, subfolders=True), args.limit)

    @cache
    def model(index: int) -> torch.nn.Module:
        form = args.forms[index]
        return load_model(args.model, args.weights, args.block, form, ratios_of(form, args)).to(args.device)

    @cache
    def reference(size: tuple[int, int]) -> Any:
        check_size(size, model(0).patch_size)
        chosen = [photo for photo in (photo_at(path, size) for path in photos) if photo is not None]
        if not chosen:
            raise ValueError(f"none of {len(photos)} photos is as large as {size[0]}x{size[1]}, and enlarged ones lie")
        return reference_at(model(0), chosen, size)

    def make(case: Case) -> dict[str, Any]:
        index = args.forms.index(case.form) if case.form else 0
        return measure(model(index), case, ratios_of(args.forms[index], args), reference(case.size))

    if args.block is None:
        args.block = _depth(args.model) - 2
    weights = "timm's" if args.weights is None else digest([args.weights])
    common = {"kind": "features", "model": args.model, "weights": weights, "block": args.block, "data": digest(photos)}
    return rows(args, common, kept, make)


def _depth(name: str) -> int:
    with torch.device("meta"):
        return len(create_timm_model(name, False, None).blocks)


def labels(args: argparse.Namespace, kept: KeptRows) -> Iterator[dict]:
    """The rows of the second table, made or found."""
    with needed_packages("measure_accuracy"):
        from evidence.miou_without_training import evaluate, load_segmentor, switch_for, zero_is_void

    pairs = find_pairs(args.images, args.masks, args.limit)
    void = zero_is_void(args.config)

    @cache
    def model(index: int) -> torch.nn.Module:
        form = args.forms[index]
        return load_segmentor(args.config, args.checkpoint, form, ratios_of(form, args)).to(args.device)

    def make(case: Case) -> dict[str, Any]:
        index = args.forms.index(case.form) if case.form else 0
        switch = switch_for(model(index), case, ratios_of(args.forms[index], args), [pair.photo for pair in pairs])
        return evaluate(model(index), switch, pairs, void)

    data = digest([path for pair in pairs for path in pair])
    weights = digest([args.config, args.checkpoint])
    return rows(args, {"kind": "labels", "weights": weights, "data": data}, kept, make)


def boxes(args: argparse.Namespace, kept: KeptRows) -> Iterator[dict]:
    """The rows of the third table, made or found."""
    with needed_packages("measure_accuracy"):
        from evidence.ap_without_training import SwitchedDetector, check_switchable
        from evidence.detection_photos import files_of
        from evidence.trained_detectors import files_of_run, finds_masks, load_boxes, load_detector, weights_digest

        check_switchable(args.forms)
        detector = load_detector(args.run, args.config, args.device)

    common = {"kind": "boxes", "weights": weights_digest(detector.model), "limit": args.limit}
    common |= {"run": digest(files_of_run(args.run, args.config)), "data": digest(list(files_of(args.coco, "val")))}
    common |= {"run's scorer": scorer_digest(detector.backbone.patches.scorer)}
    switched = SwitchedDetector(detector, load_boxes(args.coco, args.limit, finds_masks(detector)))

    def make(case: Case) -> dict[str, Any]:
        return switched.measure(case, ratios_of(case.form or args.forms[0], args))

    try:
        detector.scale_photos(1.0)
    except ValueError as error:
        print(f"without rows of smaller images: {error}")
        return rows(args, common, kept, make, leave_out=SMALLER)
    return rows(args, common, kept, make)


def rows(
    args: argparse.Namespace, common: Mapping[str, Any], kept: KeptRows, make: Callable[[Case], dict[str, Any]],
    leave_out: str | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Yield the rows in the table's order, those found in ``kept`` at once."""
    listed = [case for case in cases(args.sizes, args.shares, args.forms) if case.variant != leave_out]
    for case in tqdm(listed, "rows"):
        settings = settings_of(case, common, args)
        yield kept.get(settings) or kept.add(settings, make(case))


def write_tables(args: argparse.Namespace, found: Sequence[dict], command: str) -> str:
    """Write the tables and the curves, and return the table in Markdown with what it was made by."""
    write_csv(found, args.out / "table.csv")
    measure = MEASURES[args.kind]
    plot(found, measure, args.out / "curves.png", against_time=args.times)
    forms = "; ".join(form.text for form in args.forms)
    columns = {name: text for name, text in COLUMNS.items() if name != "ms" or args.times}
    text = f"    {command}\n\n{markdown(found, columns)}\n\nForms: {forms}. Scaled thresholds: {args.thresholds}. "
    text += (
        f"{date.today().isoformat()}, {environment(torch.device(args.device))}. Nothing in it is drawn at random.\n\n"
    )
    text += "".join(f"- {line}.\n" for line in crossings(found, measure))
    write_text_whole(args.out / "table.md", text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv, __doc__)
    command = command_line("measure_accuracy", argv)
    try:
        check(args)
        args.out.mkdir(parents=True, exist_ok=True)
        make = {"features": features, "labels": labels, "boxes": boxes}[args.kind]
        found = list(make(args, KeptRows(args.out / "rows.jsonl")))
        record_arguments(argv, args.out)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"measure_accuracy: {' '.join(str(error).split())}")
    print(write_tables(args, found, command))


if __name__ == "__main__":
    shared.interrupts.run(main)
