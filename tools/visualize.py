"""Draw which patches the adaptive backbone cuts photos into.

    python tools/visualize.py photo.jpg --out patches.png
    python tools/visualize.py my_photos/ --out drawn/ --thresholds 5.5 4.0
    python tools/visualize.py my_photos/ --out drawn/ --config configs/mmseg/upernet_apt_vit-b16_160k_ade20k-512x512.py

Each photo NAME.jpg gives NAME_patches.png: the photo with the outline of every patch, larger patches tinted by their
size, below a caption with the number of patches of each size and the share of tokens kept. No weights are needed: the
partition depends on the pixels only.

A folder stands for the photos directly in it. A photo that cannot be read is named and left out; the others are still
drawn, and the exit status is then 1. A folder without photos and a missing path stop the run before anything is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_demo_data import PHOTO_SUFFIXES, decode, is_photo
from torch import Tensor
from tqdm import tqdm

from apt_dense import APTViT
from apt_dense.patches.partition import count_tokens
from apt_dense.patches.scores import SCORERS

from shared.pictures import draw_patches, resize_longer_side, stack, text_bar, token_caption, write_png

THRESHOLDS = (5.5, 4.0)  # the released code's, for entropy in bits
PARTITION_OPTIONS = ("patch_size", "thresholds", "scorer", "pixel_mean", "pixel_std", "channel_order")


class VisualizeError(Exception):
    """What the user can put right; the message is one line."""


def make_partitioner(patch_size: int = 16, thresholds: Sequence[float] = THRESHOLDS, **options: Any) -> APTViT:
    """The smallest model that cuts images up as one with these options does.

    Args:
        **options: ``scorer``, ``pixel_mean``, ``pixel_std``, ``channel_order`` as for :class:`APTViT`.

    Raises:
        ValueError, TypeError: as APTViT does.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size}: expected at least 1 pixel")
    size = (patch_size * 2 ** len(thresholds), patch_size)  # any image size runs; this one has few positions
    return APTViT(
        img_size=size, patch_size=patch_size, embed_dim=8, depth=1, num_heads=1, thresholds=thresholds, **options
    )


def normalise(image: np.ndarray, model: APTViT) -> Tensor:
    """(H, W, 3) uint8 RGB -> (1, 3, H, W) float32, normalised as the model expects."""
    mean, std, order = model.pixel_format
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float()
    pixels = pixels if order == "RGB" else pixels.flip(0)
    return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


def partition_photo(image: np.ndarray, model: APTViT) -> tuple[np.ndarray, list[int]]:
    """The scale map (h, w) of an image (H, W, 3) uint8 RGB, and its number of patches of scale 0, 1, ..."""
    scale_map = model.partition(normalise(image, model))
    per_scale = count_tokens(scale_map, len(model.thresholds) + 1)[0].tolist()
    return scale_map[0].numpy(), per_scale


def draw_photo(image: np.ndarray, model: APTViT) -> tuple[np.ndarray, float]:
    """The picture of an image (H, W, 3) uint8 RGB, below its caption, and the share of tokens kept."""
    scale_map, per_scale = partition_photo(image, model)
    line = max(1, round(max(image.shape[:2]) / 1500))
    caption = token_caption(per_scale, scale_map.size, model.patch_size)
    bar = text_bar(image.shape[1], caption, size=max(14, image.shape[1] // 45))
    return stack([bar, draw_patches(image, scale_map, model.patch_size, line)]), sum(per_scale) / scale_map.size


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """A photo as (H, W, 3) uint8 RGB, upright, its longer side ``size`` pixels. Raises VisualizeError."""
    try:
        pixels = decode(path.read_bytes())
    except OSError as error:
        raise VisualizeError(f"{path} cannot be opened: {error.strerror}") from error
    if pixels is None:
        raise VisualizeError(f"{path} is not a readable photo; remove it or save it again")
    image = np.ascontiguousarray(pixels[..., ::-1])
    return image if size is None else resize_longer_side(image, size)


def find_photos(inputs: Sequence[Path]) -> list[Path]:
    """The photos of all inputs, those of a folder by name, each once. Raises VisualizeError."""
    photos: dict[Path, None] = {}
    for path in inputs:
        if not path.exists():
            raise VisualizeError(f"{path} does not exist; give a photo or a folder of photos")
        found = sorted(filter(is_photo, path.iterdir())) if path.is_dir() else [path]
        if not found:
            raise VisualizeError(f"the folder {path} holds no photos ({' '.join(PHOTO_SUFFIXES)})")
        photos |= dict.fromkeys(found)
    return list(photos)


def name_pictures(photos: Sequence[Path], out: Path) -> list[Path]:
    """Where each photo's picture goes: ``out`` itself if it is a PNG's name, else a file of its own in that folder."""
    if out.suffix.lower() == ".png":
        if len(photos) > 1:
            raise VisualizeError(f"--out {out} is one file, but there are {len(photos)} photos; give a folder")
        pictures = [out]
    else:
        stems = [photo.stem for photo in photos]
        names = [photo.stem if stems.count(photo.stem) == 1 else photo.name for photo in photos]
        pictures = [out / f"{name}_patches.png" for name in names]
    _check_pictures(photos, pictures)
    return pictures


def _check_pictures(photos: Sequence[Path], pictures: Sequence[Path]) -> None:
    taken: dict[Path, Path] = {}
    inputs = {photo.resolve() for photo in photos}
    for photo, picture in zip(photos, pictures, strict=True):
        if picture.resolve() in inputs:
            raise VisualizeError(f"--out would overwrite the photo {picture}; give another name or folder")
        if picture in taken:
            raise VisualizeError(f"{taken[picture]} and {photo} would both become {picture}; rename one of them")
        taken[picture] = photo


def config_options(path: Path) -> dict[str, Any]:
    """What of an MMSeg config's backbone decides about the partition. Raises VisualizeError."""
    try:
        from mmengine.config import Config
    except ImportError as error:
        raise VisualizeError('--config needs MMEngine: pip install "apt_dense[mmseg]"') from error
    if not path.is_file():
        raise VisualizeError(f"--config {path} does not exist")
    try:
        backbone = Config.fromfile(path, import_custom_modules=False).model.backbone
    except Exception as error:  # a config is a program: whatever it raises
        reason = str(error).strip().splitlines() or [""]
        raise VisualizeError(f"--config {path} is no MMSeg config: {type(error).__name__}: {reason[0]}") from error
    if backbone.get("type") != "APTViT":
        raise VisualizeError(f"--config {path}: its backbone is {backbone.get('type')}, expected APTViT")
    return {"thresholds": (), **{key: backbone[key] for key in PARTITION_OPTIONS if key in backbone}}


def model_of(args: argparse.Namespace) -> APTViT:
    """The partitioner of the config, as far as the command line does not say otherwise. Raises VisualizeError."""
    options = config_options(args.config) if args.config else {}
    given = {"thresholds": args.thresholds, "scorer": args.scorer, "patch_size": args.patch_size}
    options |= {key: value for key, value in given.items() if value is not None}
    if options.get("scorer", "entropy") != "entropy" and "thresholds" not in options:
        raise VisualizeError(f"--scorer {options['scorer']} has a range of its own; give its --thresholds, too")
    try:
        return make_partitioner(**options)
    except (ValueError, TypeError) as error:
        raise VisualizeError(str(error)) from error


def draw_all(photos: Sequence[Path], pictures: Sequence[Path], model: APTViT, size: int | None) -> list[float]:
    """Write all pictures and return the shares of tokens kept; a broken photo is reported and left out."""
    shares = []
    for photo, picture in zip(tqdm(photos, "drawing", unit="photo", disable=len(photos) == 1), pictures, strict=True):
        try:
            drawn, share = draw_photo(read_image(photo, size), model)
        except VisualizeError as error:
            tqdm.write(f"visualize: left out: {error}", file=sys.stderr)
            continue
        write_png(picture, drawn)
        shares.append(share)
    return shares


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="photo, or folder of photos")
    parser.add_argument("--out", type=Path, required=True, help="folder, or for a single photo FILE.png")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        metavar="T",
        help="for patches of 2, 4, ... times the patch size: flat if the score is lower (default: "
        f"{' '.join(map(str, THRESHOLDS))})",
    )
    parser.add_argument("--scorer", choices=sorted(SCORERS), help="what measures flatness (default: entropy)")
    parser.add_argument("--patch-size", type=int, metavar="P", help="pixels of the smallest patches (default: 16)")
    parser.add_argument("--size", type=int, metavar="N", help="resize the longer side to N pixels first")
    parser.add_argument("--config", type=Path, help="MMSeg config whose backbone's settings replace these defaults")
    args = parser.parse_args(argv)
    if args.size is not None and args.size < 1:
        parser.error(f"--size {args.size}: expected at least 1 pixel")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        model = model_of(args)
        photos = find_photos(args.inputs)
        pictures = name_pictures(photos, args.out)
        pictures[0].parent.mkdir(parents=True, exist_ok=True)
        shares = draw_all(photos, pictures, model, args.size)
    except (VisualizeError, OSError) as error:
        sys.exit(f"visualize: {error}")
    if shares:
        kept = f"tokens kept {100 * np.mean(shares):.0f} % on average"
        print(f"{len(shares)} of {len(photos)} photos drawn in {args.out}, {kept}")
    if len(shares) < len(photos):
        sys.exit(f"visualize: {len(photos) - len(shares)} of {len(photos)} photos could not be read, see above")


if __name__ == "__main__":
    main()
