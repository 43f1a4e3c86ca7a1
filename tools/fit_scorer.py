"""Learn from labels which patches may be merged, and write a scorer for the backbone's option "scorer".

    python tools/fit_scorer.py --images data/camvid/images/training --masks data/camvid/annotations/training \\
        --zero-is-void --patch-size 14 --size 364x476 --out scorer.safetensors
    python tools/fit_scorer.py --coco data/nuclei --size 512 --out scorer.safetensors
    python tools/fit_scorer.py --images ... --masks ... --size 1024x1024 --model vit_small_patch14_dinov2 --out ...
    python tools/calibrate.py my_photos --scorer scorer.safetensors --thresholds 0.03 0.007 --tokens 0.6 --out found/

Entropy merges what has little contrast, whatever it is: dark cars on dark streets. This network of 77,000 weights tells
from a patch and what is around it which share of its pixels is of another class than most of it, and is trained on your
masks in minutes. --model trains the first blocks of a pretrained ViT instead, which see photos resized until each patch
is one of theirs: they take longer, and hide less on photos unlike those with masks (docs/EVIDENCE.md).

Scores are from 0 to 1; at a threshold of 0.01 a patch is merged where a hundredth of it is expected to be something
else. Every tenth photo is held out; it prints what merging hides there, and the thresholds.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("fit_scorer"):
    import torch

    from apt_dense import PatchSelector
    from apt_dense.options import PixelFormat
    from apt_dense.patches.learned_scores import NEXT_SCALE
    from apt_dense.patches.scorer_files import SUFFIX, as_bytes
    from apt_dense.patches.scores import SCORERS, Scorer
    from apt_dense.weights.files import write_whole

    from calibration.coco_objects_as_labels import load_objects
    from calibration.learned_scorer_training import Fit, Network, hidden_by, photo_batches, train_scorer
    from calibration.scorer_networks import FirstBlocksNetwork, PatchNetwork, pretrained_blocks
    from evidence.equal_token_rows import parse_size, square_size
    from evidence.labelled_photos import find_pairs
    from evidence.photos_in_memory import LabelledSet, load_set
    from shared.normalise import normalise
    from shared.option_types import PIXELS, SEEDS, device, whole
    from shared.tables import markdown
    from shared.thresholds_for_share import scores_of, short, thresholds_for

HELD_OUT = 10  # every tenth photo
TOKENS = 0.8, 0.6, 0.4  # shares that are printed
USUAL_BLOCKS = 4


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, nargs="+", metavar="DIR", help="folders of photos")
    add("--masks", type=Path, nargs="+", metavar="DIR", help="PNG files of the same names, 8-bit labels")
    add("--coco", type=Path, metavar="DATA", help="instead of these, a folder of detection data in COCO's layout")
    add("--zero-is-void", action="store_true", help="label 0 is not counted, as 255")
    add(
        "--size",
        required=True,
        metavar="HxW",
        help="pixels that the model sees photos in; N of the longer side of COCO's",
    )
    add(
        "--patch-size",
        type=whole(1, PIXELS),
        default=16,
        metavar="P",
        help="pixels of the smallest patches (default: %(default)s)",
    )
    add(
        "--scales",
        type=whole(1, 16),
        default=2,
        metavar="N",
        help="coarse patch sizes that are scored (default: %(default)s)",
    )
    add("--model", metavar="NAME", help="a timm ViT, whose first blocks score (default: a network without pretraining)")
    add("--weights", type=Path, metavar="FILE", help="of --model (default: timm's, downloaded)")
    add("--blocks", type=whole(1), metavar="K", help=f"of --model, from the first (default: {USUAL_BLOCKS})")
    add("--epochs", type=whole(1), default=Fit._field_defaults["epochs"], help="default: %(default)s")
    add("--limit", type=whole(1), metavar="N", help="photos to use at most, evenly spread")
    add("--seed", type=whole(0, SEEDS), default=0)
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True, metavar=f"FILE{SUFFIX}")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> Fit:
    """Turn text into values. Raises ValueError."""
    if args.out.suffix != SUFFIX:
        raise ValueError(f"--out {args.out}: expected a name that ends in {SUFFIX}")
    if (args.coco is None) == (args.images is None or args.masks is None):
        raise ValueError("give --images and --masks, or --coco")
    for option in ("weights", "blocks"):
        if getattr(args, option) is not None and args.model is None:
            raise ValueError(f"--{option} {getattr(args, option)}: give --model, whose they are")
    size = parse_size(args.size) if args.coco is None else square_size(args.size)
    if min(size) < args.patch_size << args.scales:
        raise ValueError(
            f"--size {args.size} holds no patch of {args.patch_size << args.scales} pixels; give fewer --scales"
        )
    return Fit(args.patch_size, args.scales, size, args.epochs)


def load_labelled(args: argparse.Namespace, fit: Fit) -> LabelledSet:
    """Read what is learned from. Raises ValueError, OSError."""
    if args.coco is not None:
        return load_objects(args.coco, fit.size[0], args.limit, torch.device(args.device))
    pairs = find_pairs(args.images, args.masks, args.limit)
    return load_set(pairs, args.zero_is_void, 255, torch.device(args.device), fit.size)


def network_of(args: argparse.Namespace) -> Callable[[], Network]:
    """Return a function that builds the network to train. Raises ValueError, OSError."""
    if args.model is None:
        return PatchNetwork
    return partial(FirstBlocksNetwork, *pretrained_blocks(args.model, args.blocks or USUAL_BLOCKS, args.weights))


def fit_scorer(args: argparse.Namespace) -> str:
    """Train, write the scorer, and return a table of what merging hides. Raises ValueError, OSError."""
    fit, build = check(args), network_of(args)
    data = load_labelled(args, fit)
    count = len(data.masks)
    if count < 2 * HELD_OUT:
        raise ValueError(f"{count} labelled photos: expected {2 * HELD_OUT} or more")
    held_out = torch.arange(count, device=args.device) % HELD_OUT == HELD_OUT // 2
    scorer = train_scorer(LabelledSet(*(part[~held_out] for part in data)), fit, args.seed, build)
    with write_whole(args.out) as file:
        file.write_bytes(as_bytes(scorer))
    rest = list(photo_batches(LabelledSet(*(part[held_out] for part in data)), args.coco is not None))
    return table_of(scorer, rest, fit)


def table_of(scorer: Scorer, batches: Sequence[LabelledSet], fit: Fit) -> str:
    """Format the pixels hidden on held-out photos, and the thresholds, for each share of tokens."""
    scorers = {"learned": scorer, "entropy": SCORERS["entropy"]}
    found = {name: hidden_by(each, batches, fit, TOKENS) for name, each in scorers.items()}
    found["thresholds"] = thresholds_of(scorer, batches, fit)
    rows = [{"tokens": kept, **{name: values[i] for name, values in found.items()}} for i, kept in enumerate(TOKENS)]
    columns = {"tokens": "{:.0%}", "learned": "{:.1%}", "entropy": "{:.1%}", "thresholds": "{}"}
    size, count = 2 * fit.patch_size, sum(len(batch.masks) for batch in batches)
    return (
        f"On {count} photos held out, when patches of {size} pixels are merged in the order of their scores: hidden of "
        f"the pixels that merging all of them would give another class. And the thresholds of {fit.scales} coarse "
        f"scale{'s' * (fit.scales > 1)} with which these photos keep as many tokens:\n\n{markdown(rows, columns)}"
    )


def thresholds_of(scorer: Scorer, batches: Sequence[LabelledSet], fit: Fit) -> list[str | None]:
    """Thresholds for each share of ``TOKENS``, those of a scale ``NEXT_SCALE`` times those of the scale before; None
    for a share that cannot be reached."""
    ratios = tuple(NEXT_SCALE**scale for scale in range(fit.scales))
    selector = PatchSelector(patch_size=fit.patch_size, thresholds=ratios, scorer=scorer)
    photos = (photo for batch in batches for photo in batch.photos.cpu().split(1))
    scores = [scores_of(selector, normalise(photo.float(), PixelFormat())) for photo in photos]
    found: list[str | None] = []
    for share in TOKENS:
        try:
            found.append(" ".join(map(short, thresholds_for(scores, ratios, share))))
        except ValueError:
            found.append(None)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        print(fit_scorer(args))
    except (ValueError, OSError) as error:
        sys.exit(f"fit_scorer: {' '.join(str(error).split())}")
    print(
        f"\n{args.out}: set scorer={str(args.out)!r} and thresholds; for other photos and shares, tools/calibrate.py "
        f"--scorer {args.out} --thresholds ... scales them"
    )


if __name__ == "__main__":
    with needed_packages("fit_scorer"):
        shared.interrupts.run(main)
