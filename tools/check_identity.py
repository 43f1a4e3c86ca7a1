"""Check on a photo that the backbone without thresholds is the ViT that it replaces.

    python tools/check_identity.py vit_base_patch16_224.mae --pretrained
    python tools/check_identity.py vit_small_patch14_dinov2 --img-size 518 --image photo.jpg
    python tools/check_identity.py configs/mmseg/upernet_apt_vit-b16_160k_ade20k-512x512.py --checkpoint vit_b.pth
    python tools/check_identity.py configs/detectron2/mask_rcnn_apt_vitdet_b_100ep.py

A timm model is compared with timm's, a config of MMSegmentation with its VisionTransformer, a lazy config of Detectron2
with its ViT. Weights are those of --checkpoint, loaded into both, or random, every parameter, so that each one matters.
Prints the largest difference of each output, its scale (root mean square), and how far float32 takes the original
itself from what it gives in float64. It passes up to 1e-4 where activations are of unit scale and in proportion beyond,
or up to four times what float32 does to the original; the exit status is 1 if it fails.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("check_identity"):
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch import Tensor

    from apt_dense.options import PixelFormat

    from identity.model_pairs import Pair, Weights, detectron2_pair, mmseg_pair, timm_pair
    from shared.normalise import normalise, to_grey_levels

TOLERANCE = 1e-4
ROUNDINGS = 4  # times the original's own error: both models have one, and sum in another order
HOSTS = {"mmseg": mmseg_pair, "detectron2": detectron2_pair}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help="a timm name, or a config file")
    parser.add_argument("--host", choices=HOSTS, help="whose config it is (default: told by its content)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for both")
    parser.add_argument("--pretrained", action="store_true", help="timm's pretrained weights")
    parser.add_argument("--image", type=Path, metavar="FILE", help="default: scikit-image's astronaut")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="S", help="pixels of the photo: S, or H W")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    return parser.parse_args(argv)


def build_pair(args: argparse.Namespace, size: tuple[int, int] | None) -> Pair:
    if args.checkpoint is not None and args.pretrained:
        raise ValueError("--checkpoint and --pretrained both say where weights come from; give one of them")
    weights, path = Weights(args.checkpoint, args.pretrained, args.seed), Path(args.model)
    if path.suffix in (".py", ".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"config {path} does not exist")
        return HOSTS[args.host or host_of(path)](path, weights)
    if args.host:
        raise ValueError(f"--host goes with a config file, and {args.model} is not one")
    return timm_pair(args.model, weights, size)


def host_of(path: Path) -> str:
    """Tell whose config a file is: MMEngine's name their parts by ``type`` and inherit by ``_base_``."""
    text = path.read_text(encoding="utf-8")
    return "mmseg" if any(sign in text for sign in ("_base_", "type=", '"type"')) else "detectron2"


def image_size(sizes: Sequence[int] | None) -> tuple[int, int] | None:
    if sizes is not None and (len(sizes) > 2 or min(sizes) < 1):
        raise ValueError(f"--img-size takes one or two numbers of pixels, not {' '.join(map(str, sizes))}")
    return None if sizes is None else (sizes[0], sizes[-1])


def read_photo(path: Path | None) -> np.ndarray:
    """Read (H, W, 3) uint8 RGB; without a path, scikit-image's astronaut. Raises ValueError."""
    if path is not None:
        try:
            return np.array(Image.open(path).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises any of these for damaged files
            raise ValueError(f"{path} is not a readable photo") from error
    try:
        from skimage.data import astronaut
    except ImportError as error:
        raise ValueError("scikit-image, which has the default photo, is not installed; give --image FILE") from error
    return astronaut()


def prepare(photo: np.ndarray, size: tuple[int, int], pixel_format: PixelFormat) -> Tensor:
    """Resize (H, W, 3) uint8 RGB and normalise it as a model expects: (1, 3, *size) float32."""
    pixels = F.interpolate(to_grey_levels(photo), size=size, mode="bilinear", antialias=True)
    return normalise(pixels.round(), pixel_format)


def tolerance(scale: float, rounding: float) -> float:
    """The largest difference that passes, by the scale of an output and the original's own error in float32."""
    return max(TOLERANCE * max(1.0, scale), ROUNDINGS * rounding)


@torch.inference_mode()
def compare(pair: Pair, images: Tensor) -> bool:
    """Print a line per output; return whether all of them agree."""
    ours, original, exact = pair.ours(images), pair.original(images), pair.exact(images)
    passed = ours.keys() == original.keys()
    print(f"{pair.title}, images {tuple(images.shape)}\n{'output':<12}{'difference':>12}{'scale':>10}{'float32':>12}")
    for name, expected in original.items():
        scale = expected.square().mean().sqrt().item()
        rounding = (expected - exact[name]).abs().max().item()
        difference = math.inf
        if name in ours and ours[name].shape == expected.shape:
            difference = (ours[name] - expected).abs().max().item()
        agrees = difference <= tolerance(scale, rounding)  # also False where either is not finite
        passed &= agrees
        print(f"{name:<12}{difference:>12.1e}{scale:>10.3g}{rounding:>12.1e}{'' if agrees else '  differs'}")
    print("PASS" if passed else f"FAIL: beyond {TOLERANCE:g} at unit scale and {ROUNDINGS} times the float32 column")
    return passed


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        size = image_size(args.img_size)
        photo = read_photo(args.image)
        pair = build_pair(args, size)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"check_identity: {' '.join(str(error).split())}")
    passed = compare(pair, prepare(photo, size or pair.img_size, pair.pixel_format))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    with needed_packages("check_identity"):
        shared.interrupts.run(main)
