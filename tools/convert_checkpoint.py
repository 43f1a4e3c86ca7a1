"""Convert the weights of a plain ViT between the projects that have one.

    python tools/convert_checkpoint.py mae_pretrain_vit_base.pth vit_b.safetensors
    python tools/convert_checkpoint.py dinov2_vitb14.pth vit_b16.pth --patch-size 16 --img-size 512
    python tools/convert_checkpoint.py work_dirs/.../iter_160000.pth vit_b_mmseg.pth --to mmseg --drop-coarse
    python tools/convert_checkpoint.py eva02_L.pth init.pth --to eva02_det --img-size 512
    python tools/convert_checkpoint.py cityscapes.pth square.pth --grid 32 64 --img-size 512

Reads .pth (.pt, .bin), .safetensors and Detectron2's .pkl, of a backbone or of a whole model, whose backbone is taken
out; pickled code is never run. Writes .pth or .safetensors, with our names or those of another project's ViT. Weights
keep their bits, except patches and positions that are resampled on request (by timm's functions).

Positions are a list, whose length does not tell 16 x 4 from 8 x 8: --grid names the rows and columns of the input file
where it does not say them itself and they are not a square.

One line says what became of the weights. Missing or unknown ones end the run before anything is written.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from apt_dense.weights.arguments_in_own_metadata import with_notes
from apt_dense.weights.convert import from_apt, problems, split_backbone, to_apt
from apt_dense.weights.files import SUFFIXES, read_checkpoint, write_checkpoint
from apt_dense.weights.find_backbone_weights import innermost, unwrap
from apt_dense.weights.formats import FORMATS, WRITABLE, StateDict, detect_format
from apt_dense.weights.load import LoadReport
from apt_dense.weights.resize import Grid, noted_grid, prefix_counts, resize_state, source_grid, split_prefix

#: Where other projects' whole models keep their backbone, so that their loaders find it.
PREFIXES = {"detectron2": "backbone.net.", "eva02_det": "backbone.net.", "sam": "image_encoder."}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT", help="ends in .pth or .safetensors")
    parser.add_argument("--to", choices=WRITABLE, default="apt", help="names to write (default: ours)")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="names to read (default: detected)")
    parser.add_argument("--patch-size", type=int, metavar="P", help="resample the patch embedding to P pixels")
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="S", help="resample positions to images of S (or H W) pixels"
    )
    parser.add_argument(
        "--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="grid of IN's positions (default: a square)"
    )
    parser.add_argument("--prefix", help="put before all names (default: backbone.net. for Detectron2, ...)")
    parser.add_argument("--drop-coarse", action="store_true", help="leave out what was trained for coarse patches")
    parser.add_argument("--partial", action="store_true", help="write even if weights are missing or unknown")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args(argv)


def check_out(out: Path, force: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out} ends in {out.suffix!r}; expected {' or '.join(SUFFIXES)}")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; --force overwrites it")
    if not out.parent.is_dir():
        raise ValueError(f"folder {out.parent} does not exist")


def image_size(sizes: Sequence[int] | None) -> tuple[int, int] | None:
    """Pixels (H, W) of one or two numbers."""
    if sizes is not None and len(sizes) > 2:
        raise ValueError(f"--img-size takes one number or two, not {len(sizes)}")
    return None if sizes is None else (sizes[0], sizes[-1])


def convert(state: StateDict, args: argparse.Namespace, content: Mapping | None = None) -> tuple[StateDict, LoadReport]:
    """Convert a backbone's state dict to the one to write, and report on each weight by our names.

    Args:
        content: the state dict with the file's notes, of the grid of the positions and of options.

    Raises:
        ValueError: for weights that are missing, unknown or without a place in the format to write.
    """
    ours, unused = split_backbone(to_apt(state, args.source_format))
    missing, unexpected = problems(ours)
    known = {name: value for name, value in ours.items() if name not in unexpected}
    if (missing or unexpected) and not (args.partial and "patch_embed.proj.weight" in known):
        report = LoadReport(list(known), [], [], missing, unused, unexpected)
        raise ValueError(f"this is not a whole backbone: {report}. Try --from, or --partial for the rest")
    content = {} if content is None else content
    source = source_grid(known, args.grid and tuple(args.grid), noted_grid(content))
    resized, grid = resize(known, args, source)
    written = from_apt(resized, args.to, args.drop_coarse, grid)
    changed = [name for name in resized if not torch.equal(resized[name], known[name])]
    loaded = [name for name in resized if name not in written.left_out]
    assumed = "" if source else assumed_square(known, args)
    report = LoadReport(loaded, changed, written.added, missing, unused + written.left_out, unexpected, assumed)
    prefix = PREFIXES.get(args.to, "") if args.prefix is None else args.prefix
    named = {prefix + name: value for name, value in written.state.items()}
    return with_notes(named, prefix, content, grid if "pos_embed" in resized else None), report


def assumed_square(state: StateDict, args: argparse.Namespace) -> str:
    """Say what square positions of an unknown grid were taken for; "" where they need not be told from their prefix."""
    positions, place = state.get("pos_embed"), FORMATS[args.to].place
    needed = args.img_size or place.position_grid or place.class_position
    if positions is None or positions.ndim != 3 or not needed:
        return ""
    side = split_prefix(positions, prefix_counts(state))[1].shape[1]
    return f"positions were taken for {side} x {side}, since {args.source.name} does not say (--grid)"


def resize(state: StateDict, args: argparse.Namespace, grid: Grid | None) -> tuple[StateDict, Grid | None]:
    """Resample a state dict as asked, from positions of ``grid``; return it with the grid that it then has."""
    size = image_size(args.img_size)
    resized = resize_state(state, args.patch_size, size, grid)
    patch, positions = resized["patch_embed.proj.weight"].shape[-1], resized.get("pos_embed")
    if size is not None:
        return resized, (size[0] // patch, size[1] // patch)
    if grid is None and positions is not None and positions.ndim == 4:  # which may become a list
        grid = tuple(positions.shape[1:3])
    return resized, grid


def run(args: argparse.Namespace) -> None:
    check_out(args.out, args.force)
    content = read_checkpoint(args.source)
    state = unwrap(content)
    found = args.source_format or detect_format(state)
    print(f"{args.source}: {len(state)} weights of {FORMATS[found].title} ({found})")
    converted, report = convert(state, args, innermost(content))
    write_checkpoint(converted, args.out)
    print(f"{args.out}: {len(converted)} weights of {FORMATS[args.to].title}: {report}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint: {error}")


if __name__ == "__main__":
    shared.interrupts.run(main)
