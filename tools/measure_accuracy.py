"""Measure what adaptive patches cost in accuracy before anything is trained, next to a smaller image of as many tokens.

    python tools/measure_accuracy.py features --model vit_small_patch14_dinov2 --weights dinov2_s14.pth \\
        --photos my_photos --sizes 504x672 --form adaptive --form "half: proportional_attention=0.5" --out runs/features
    python tools/measure_accuracy.py labels --config CONFIG --checkpoint iter_1840.pth --sizes 364x476 \\
        --images data/camvid/images/testing --masks data/camvid/annotations/testing --out runs/labels

"features" compares with the features of the uniform model after a block: mean cosine over cells and photos; those of a
smaller image are enlarged bilinearly. "labels" is the mIoU of a model of MMSegmentation, trained with or without
adaptive patches, with the same weights. A form is a name and options of APTViT. For each share of tokens, thresholds
are scaled until all images together keep it, and a smaller image has as many patches.

OUT gets rows.jsonl, table.csv, table.md and curves.png. Interrupted, the same command continues after the last whole
row. The figures do not change from run to run; times, in table.csv and with --times shown, do.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("measure_accuracy"):
    import torch
    from tqdm import tqdm

    from apt_dense.weights.files import write_text_whole
    from apt_dense.weights.timm_arguments import create_timm_model

    from evidence.equal_token_rows import Case, cases, check_size, crossings, parse_size
    from evidence.feature_similarity import load_model, measure, photo_at, reference_at
    from evidence.file_digest import digest
    from evidence.labelled_photos import find_pairs
    from evidence.model_forms import PLAIN, Form, check_names, parse_form
    from evidence.plot_accuracy_curves import plot
    from evidence.resumable_rows import KeptRows
    from shared.machine_and_versions import environment
    from shared.option_types import device, whole
    from shared.photo_files import evenly_spread, find_photos
    from shared.tables import markdown, write_csv

MEASURES = {"features": "cosine", "labels": "mIoU"}
COLUMNS = {
    "size": "{}", "variant": "{}", "share": "{:.0%}", "tokens": "{:.1%}", "cosine": "{:.4f}", "least_cosine": "{:.4f}",
    "mIoU": "{:.2f}", "boundary": "{:.2f}", "accuracy": "{:.2f}", "ms": "{:.1f}", "photos": "{}", "images": "{}",
}  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for each in (features, labels):
        each.add_argument("--sizes", nargs="+", required=True, metavar="HxW", help="pixels, whole patches")
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
    args.sizes = [parse_size(size) for size in args.sizes]
    args.forms = [parse_form(text) for text in args.form or [PLAIN]]
    check_names(args.forms)
    if not all(0 < share < 1 for share in args.shares):
        raise ValueError(f"--shares {args.shares}: expected numbers between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: expected 1 or more")


def ratios_of(form: Form, args: argparse.Namespace) -> tuple[float, ...]:
    return tuple(form.options.get("thresholds", args.thresholds))


def settings_of(case: Case, common: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All that the results of a row depend on besides versions."""
    size = f"{case.size[0]}x{case.size[1]}"
    settings = {**common, "size": size, "variant": case.variant, "share": case.share}
    if case.form is not None:
        settings |= {"form": case.form.text, "ratios": list(ratios_of(case.form, args))}
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


def rows(
    args: argparse.Namespace, common: Mapping[str, Any], kept: KeptRows, make: Callable[[Case], dict[str, Any]]
) -> Iterator[dict]:
    """Yield the rows in the table's order, those found in ``kept`` at once."""
    for case in tqdm(list(cases(args.sizes, args.shares, args.forms)), "rows"):
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
    args = parse_args(argv)
    command = shlex.join(["python", "tools/measure_accuracy.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        check(args)
        args.out.mkdir(parents=True, exist_ok=True)
        make = features if args.kind == "features" else labels
        found = list(make(args, KeptRows(args.out / "rows.jsonl")))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"measure_accuracy: {' '.join(str(error).split())}")
    print(write_tables(args, found, command))


if __name__ == "__main__":
    shared.interrupts.run(main)
