"""Learn which patches may be merged, and write a scorer for the backbone's option "scorer".

    python tools/fit_scorer.py --images data/camvid/images/training --masks data/camvid/annotations/training \\
        --zero-is-void --patch-size 14 --size 364x476 --out scorer.safetensors
    python tools/fit_scorer.py --coco data/nuclei --size 512 --out scorer.safetensors
    python tools/fit_scorer.py --images ... --masks ... --size 1024x1024 --model vit_small_patch14_dinov2 --out ...
    python tools/fit_scorer.py --images my_photos --features work_dirs/my_run --size 512x512 --out scorer.safetensors
    python tools/fit_scorer.py --images my_photos --features --size 512x512 --model vit_base_patch16_224 \\
        --weights trained.pth --out scorer.safetensors
    python tools/calibrate.py my_photos --scorer scorer.safetensors --thresholds 0.03 0.0075 --tokens 0.6 --out found/

Entropy merges what has little contrast, whatever it is: dark cars on dark streets. This network of 77,000 weights tells
from a patch and what is around it which share of its pixels is of another class than most of it, and is trained on your
masks in minutes. --model trains the first blocks of a pretrained ViT instead, which see photos resized until each patch
is one of theirs: they take longer, and hide less on photos unlike those with masks (docs/EVIDENCE.md).

With --features no labels are needed: what merging hides is then the variance, within a patch, of the last features of
a trained model with patches of --patch-size alone. It is the backbone of a run of any trainer here, whose adaptive
patches are switched off (--features RUN), or --model with the weights of its training for your task (--features
alone); those of pretraining do not know what matters there. The ViT whose first blocks score need not be the run's. It
is a plain one, without relative positions, so not ViTDet's. Each step runs the trained model as well. Photos of
--images are cut to the aspect ratio of --size.

Scores are from 0 to 1. With labels, a threshold of 0.01 merges patches of which a hundredth is expected to be something
else; with features, those whose mean feature is expected to keep 0.99 of the squared length. Every tenth photo is held
out; it prints what merging hides there, and the thresholds. "@FILE" stands for the arguments in a file, as in
configs/evidence.
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

    from apt_dense.patches.first_block_scores import FirstBlocks
    from apt_dense.patches.scorer_files import SUFFIX, as_bytes
    from apt_dense.weights.files import write_whole

    from calibration.coco_objects_as_labels import load_objects
    from calibration.feature_variance import feature_variance, uniform_backbone, uniform_model
    from calibration.learned_scorer_training import LABELS, Fit, Network, Target, photo_batches, train_scorer
    from calibration.scorer_networks import FirstBlocksNetwork, PatchNetwork, pretrained_weights
    from calibration.scorer_report import hidden_table
    from evidence.equal_token_rows import parse_size, square_size
    from evidence.labelled_photos import find_pairs
    from evidence.photos_in_memory import LabelledSet, load_set, load_unlabelled
    from shared.argument_files import ArgumentParser
    from shared.option_types import PIXELS, SEEDS, device, whole
    from shared.photo_files import evenly_spread, find_photos

HELD_OUT = 10  # every tenth photo
USUAL_BLOCKS = 4


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, nargs="+", metavar="DIR", help="folders of photos")
    add("--masks", type=Path, nargs="+", metavar="DIR", help="PNG files of the same names, 8-bit labels")
    add("--coco", type=Path, metavar="DATA", help="instead of these, a folder of detection data in COCO's layout")
    add(
        "--features",
        type=Path,
        nargs="?",
        const=True,
        metavar="RUN",
        help="learn without labels, from features of a trained model: of a run's folder or checkpoint, or of --model",
    )
    add("--config", type=Path, metavar="FILE", help="config file of RUN, if RUN lacks one; executed as Python")
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
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="of --model (default: timm's, downloaded; with --features alone, needed)",
    )
    add("--blocks", type=whole(1), metavar="K", help=f"of --model, from the first (default: {USUAL_BLOCKS})")
    add("--epochs", type=whole(1), default=Fit._field_defaults["epochs"], help="default: %(default)s")
    add("--limit", type=whole(1), metavar="N", help="photos to use at most, evenly spread; all are held in memory")
    add("--seed", type=whole(0, SEEDS), default=0)
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True, metavar=f"FILE{SUFFIX}")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> Fit:
    """Turn text into values. Raises ValueError."""
    if args.out.suffix != SUFFIX:
        raise ValueError(f"--out {args.out}: expected a name that ends in {SUFFIX}")
    check_source(args)
    for option in ("weights", "blocks"):
        if getattr(args, option) is not None and args.model is None:
            raise ValueError(f"--{option} {getattr(args, option)}: give --model, whose they are")
    size = parse_size(args.size) if args.coco is None else square_size(args.size)
    if min(size) < args.patch_size << args.scales:
        raise ValueError(
            f"--size {args.size} holds no patch of {args.patch_size << args.scales} pixels; give fewer --scales"
        )
    return Fit(args.patch_size, args.scales, size, args.epochs)


def check_source(args: argparse.Namespace) -> None:
    """Raise a ValueError unless there are photos, and either labels or a model whose features are learned."""
    if (args.coco is None) == (args.images is None):
        raise ValueError("give --images or --coco, and not both")
    has_labels = args.features is None
    chosen = "--coco" if has_labels else "--features"
    surplus = [f"--{name.replace('_', '-')}" for name in ("masks", "zero_is_void") if getattr(args, name)]
    if surplus and not (has_labels and args.coco is None):
        raise ValueError(f"{surplus[0]}: leave it out with {chosen}, which reads no masks of classes")
    if args.features is True and (args.model is None or args.weights is None):
        raise ValueError(
            "--features: give --model and --weights, those of its training for your task; or a run's folder"
        )
    if args.config is not None and (has_labels or args.features is True):
        raise ValueError(f"--config {args.config}: give --features RUN, to which it belongs")
    if args.coco is None and has_labels and args.masks is None:
        raise ValueError("--images: give --masks as well, or --features, which learns without labels")


def load_photos(args: argparse.Namespace, fit: Fit) -> LabelledSet:
    """Read what is learned from. Raises ValueError, OSError."""
    device = torch.device(args.device)
    if args.coco is not None:
        return load_objects(args.coco, fit.size[0], args.limit, device)
    if args.features is not None:
        return load_unlabelled(evenly_spread(find_photos(args.images, subfolders=True), args.limit), fit.size, device)
    return load_set(find_pairs(args.images, args.masks, args.limit), args.zero_is_void, 255, device, fit.size)


def network_of(args: argparse.Namespace) -> Callable[[], Network]:
    """Return a function that builds the network to train. Raises ValueError, OSError."""
    if args.model is None:
        return PatchNetwork
    blocks = FirstBlocks(args.model, args.blocks or USUAL_BLOCKS)
    return partial(FirstBlocksNetwork, blocks, pretrained_weights(args.model, args.weights))


def target_of(args: argparse.Namespace, fit: Fit) -> Target:
    """Return the training target. Raises ValueError, OSError, ImportError."""
    if args.features is None:
        return LABELS
    own = args.features is True
    backbone = (
        uniform_model(args.model, args.weights, fit) if own else uniform_backbone(args.features, args.config, fit)
    )
    return feature_variance(backbone.to(args.device), fit.patch_size)


def fit_scorer(args: argparse.Namespace) -> str:
    """Train, write the scorer, and return a table of what merging hides. Raises ValueError, OSError."""
    fit = check(args)
    build, target = network_of(args), target_of(args, fit)
    data = load_photos(args, fit)
    count = len(data.masks)
    if count < 2 * HELD_OUT:
        raise ValueError(f"{count} photos to learn from: expected {2 * HELD_OUT} or more")
    held_out = torch.arange(count, device=args.device) % HELD_OUT == HELD_OUT // 2
    in_corners = args.coco is not None
    scorer = train_scorer(LabelledSet(*(part[~held_out] for part in data)), fit, args.seed, build, target, in_corners)
    with write_whole(args.out) as file:
        file.write_bytes(as_bytes(scorer))
    rest = list(photo_batches(LabelledSet(*(part[held_out] for part in data)), in_corners))
    return hidden_table(scorer, rest, fit, target)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        print(fit_scorer(args))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"fit_scorer: {' '.join(str(error).split())}")
    print(
        f"\n{args.out}: set scorer={str(args.out)!r} and thresholds; for other photos and shares, tools/calibrate.py "
        f"--scorer {args.out} --thresholds ... scales them"
    )


if __name__ == "__main__":
    with needed_packages("fit_scorer"):
        shared.interrupts.run(main)
