"""Draw which patches the adaptive backbone cuts photos into.

    python tools/visualize.py photo.jpg --out patches.png
    python tools/visualize.py my_photos/ --out drawn/ --thresholds 5.5 4.0
    python tools/visualize.py my_photos/ --out drawn/ --config configs/mmseg/upernet_apt_vit-b16_160k_ade20k-512x512.py
    python tools/visualize.py my_photos/ --stats-only --thresholds 5 3.5

Each photo NAME.jpg gives NAME_patches.png: the photo, and next to it the same with the outline of every patch, larger
patches tinted by their size, under a caption with the number of patches of each size, the share of tokens kept and the
thresholds. Small photos are shown enlarged, large ones shrunk, with a lighter grid. With --stats-only, a line for each
photo is printed instead. No weights are needed: the partition depends on the pixels only. Photos keep their size unless
--size or the config's tests resize them.

A folder stands for the photos directly in it. A photo that cannot be read is named and left out; the others are still
drawn, and the exit status is 1. A folder without photos or a missing path stops the run before anything is written.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.packages import needed_packages

with needed_packages("visualize"):
    import numpy as np
    from tqdm import tqdm

    from apt_dense import PatchSelector
    from apt_dense.hosts.find_patch_selector import patch_options_of
    from apt_dense.patches.learned_scores import USUAL_THRESHOLDS
    from apt_dense.patches.scorer_files import SUFFIX

    from shared.option_types import PIXELS, SCORER_HELP, whole
    from shared.patch_pictures import describe_choice, describe_counts, draw_photo, partition_photo
    from shared.photo_files import check_outputs, find_photos, name_outputs, read_photo
    from shared.picture_layout import resize_longer_side, resize_within, write_png

THRESHOLDS = (5.5, 4.0)  # the released code's, for entropy in bits
LINES_OF_OWN_DATA = {"pretrained", "architecture", "image_size"}  # of configs/mmseg/own_data_*.py
PARTITION_OPTIONS = "patch_size", "window_size", "thresholds", "scorer", "pixel_mean", "pixel_std", "channel_order"


def read_image(path: Path, size: int | None = None, scale: tuple[int, int] | None = None) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8 RGB, its longer side resized to ``size`` pixels, or within those of ``scale``.
    Raises ValueError, OSError."""
    image = read_photo(path)
    if size is not None:
        return resize_longer_side(image, size)
    return image if scale is None else resize_within(image, scale)


def name_pictures(photos: Sequence[Path], out: Path) -> list[Path]:
    """Return where each photo's picture goes: ``out`` itself if it is the name of a PNG, else a file in that folder."""
    if out.suffix.lower() != ".png":
        pictures = [out / f"{name}_patches.png" for name in name_outputs(photos)]
    elif len(photos) == 1:
        pictures = [out]
    else:
        raise ValueError(f"--out {out} is one file, but there are {len(photos)} photos; give a folder")
    check_outputs(photos, pictures)
    return pictures


def read_config(path: Path) -> Mapping[str, Any]:
    """Read an MMSeg config with an ``APTViT``, completed by what its weights tell. Raises ValueError, OSError."""
    try:
        from mmengine.config import Config
    except ImportError as error:
        raise ValueError('--config needs MMEngine: pip install "apt_dense[mmseg]"') from error
    if not path.is_file():
        raise ValueError(f"--config {path} does not exist")
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
        backbone = cfg.model.backbone
    except Exception as error:  # a config is a program: whatever it raises
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"--config {path} is not an MMSeg config: {type(error).__name__}: {reason[0]}") from error
    if backbone.get("type") != "APTViT":
        raise ValueError(f"--config {path}: its backbone is {backbone.get('type')}, expected APTViT")
    if "patch_size" not in backbone and not cfg.keys().isdisjoint(LINES_OF_OWN_DATA):
        from apt_dense.hosts.mmseg.own_data_config import complete_from_weights

        complete_from_weights(cfg)
    elif "patch_size" not in backbone and "pretrained" in backbone:  # its weights may tell
        from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in_config

        fill_in_config(cfg)
    return cfg


def config_options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config's backbone that decide about the patches."""
    options = patch_options_of(cfg["model"]["backbone"])
    return {"thresholds": (), **{key: value for key, value in options.items() if key in PARTITION_OPTIONS}}


def config_scale(cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the scale that a config's tests resize photos within; None if they do not, or change their shape."""
    loader = cfg.get("test_dataloader") or cfg.get("val_dataloader") or {}
    pipeline = (loader.get("dataset") or {}).get("pipeline") or cfg.get("test_pipeline") or ()
    steps = [step for step in pipeline if step.get("type") == "Resize" and step.get("keep_ratio")]
    scale = steps[0].get("scale") if steps else None
    return tuple(scale) if isinstance(scale, Sequence) and len(scale) == 2 else None


def selector_of(args: argparse.Namespace, cfg: Mapping[str, Any] | None) -> PatchSelector:
    """Choose patches as the config says, except where the command line says otherwise. Raises ValueError, TypeError."""
    options = {} if cfg is None else config_options(cfg)
    given = {"thresholds": args.thresholds, "scorer": args.scorer, "patch_size": args.patch_size}
    options |= {key: value for key, value in given.items() if value is not None}
    scorer = options.get("scorer", "entropy")
    usual = USUAL_THRESHOLDS if str(scorer).endswith(SUFFIX) else THRESHOLDS
    if scorer != "entropy" and usual is THRESHOLDS and "thresholds" not in options:
        raise ValueError(f"--scorer {scorer} has another range than entropy; give its --thresholds, too")
    return PatchSelector(**{"thresholds": usual, **options})


def draw_all(
    photos: Sequence[Path],
    pictures: Sequence[Path | None],
    selector: PatchSelector,
    size: int | None,
    scale: tuple[int, int] | None,
) -> list[float]:
    """Write all pictures, or a line for each photo without one, and return the shares of tokens kept; a damaged photo
    is reported and left out."""
    shares = []
    for photo, picture in zip(tqdm(photos, "drawing", unit="photo", disable=len(photos) == 1), pictures, strict=True):
        try:
            image = read_image(photo, size, scale)
        except (ValueError, OSError) as error:
            tqdm.write(f"visualize: left out: {error}", file=sys.stderr)
            continue
        patches = partition_photo(image, selector)
        shares.append(patches.tokens_kept)
        if picture is None:
            tqdm.write(f"{photo}   {describe_counts(image, selector, patches)}", file=sys.stdout)
        else:
            picture.parent.mkdir(parents=True, exist_ok=True)
            write_png(picture, draw_photo(image, selector, patches))
    return shares


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="photo, or folder of photos")
    parser.add_argument("--out", type=Path, help="folder, or for a single photo FILE.png")
    parser.add_argument("--stats-only", action="store_true", help="print the numbers and draw nothing")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        metavar="T",
        help="for patches of 2, 4, ... times the patch size: flat if the score is lower (default: "
        f"{' '.join(map(str, THRESHOLDS))})",
    )
    parser.add_argument("--scorer", metavar="NAME|FILE", help=SCORER_HELP)
    parser.add_argument(
        "--patch-size", type=whole(1, PIXELS), metavar="P", help="pixels of the smallest patches (default: 16)"
    )
    parser.add_argument("--size", type=whole(1, PIXELS), metavar="N", help="resize the longer side to N pixels first")
    parser.add_argument(
        "--config", type=Path, help="MMSeg config whose backbone's settings, and test size, replace these defaults"
    )
    args = parser.parse_args(argv)
    if args.out is None and not args.stats_only:
        parser.error("give --out for pictures, or --stats-only for numbers alone")
    if args.size is not None and args.size < 1:
        parser.error(f"--size {args.size}: expected at least 1 pixel")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cfg = read_config(args.config) if args.config else None
        selector, scale = selector_of(args, cfg), None if cfg is None else config_scale(cfg)
        photos = find_photos(args.inputs)
        pictures = [None] * len(photos) if args.stats_only else name_pictures(photos, args.out)
        shares = draw_all(photos, pictures, selector, args.size, scale)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"visualize: {error}")
    if shares:
        kept = f"tokens kept {100 * np.mean(shares):.0f} % on average, {describe_choice(selector)}"
        print(f"{len(shares)} of {len(photos)} photos {'read' if args.stats_only else f'drawn in {args.out}'}: {kept}")
    if len(shares) < len(photos):
        sys.exit(f"visualize: {len(photos) - len(shares)} of {len(photos)} photos could not be read, see above")


if __name__ == "__main__":
    shared.interrupts.run(main)
