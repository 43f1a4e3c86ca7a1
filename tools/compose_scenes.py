"""Compose large scenes with exact masks of photographs and of pictures with transparency.

    python tools/compose_scenes.py data/scenes --photos wallpapers --cutouts stamps/mammals stamps/birds stamps/fruit

A scene is a sharp part of a photograph with 4 to 12 objects on it, small ones as frequent as large ones: what images of
high resolution are for. Each folder of cut-outs is a class. Every fourth photograph and cut-out is used for validation
only. The layout is that of make_demo_data.py, for segmentation and detection; all scenes are square and of one size.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("compose_scenes"):
    from tqdm import tqdm

    from demo.dataset import SPLITS, check_numbers, check_target, write_data_set
    from demo.scenes import BACKGROUND
    from evidence.composed_scenes import composed, load_sources


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--photos", type=Path, nargs="+", required=True, metavar="PATH", help="photographs or folders")
    parser.add_argument("--cutouts", type=Path, nargs="+", required=True, metavar="DIR", help="a folder for each class")
    parser.add_argument("--train", type=int, default=400, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=100, help="validation scenes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1022, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace OUT if a tool of this kind wrote it")
    return parser.parse_args(argv)


def write(args: argparse.Namespace) -> list[str]:
    """Write the scenes; return the names of the classes. Raises ValueError and OSError."""
    check_numbers(args.train, args.val, args.size, args.seed)
    check_target(args.out, None, args.force)
    names, splits = [], []
    for split, sources in enumerate(load_sources(args.photos, args.cutouts, args.size)):
        count, names = (args.train, args.val)[split], [BACKGROUND, *sources.cutouts]
        scenes = composed(sources, args.size, [(args.seed, split, number) for number in range(count)])
        splits.append(tqdm(scenes, f"{SPLITS[split][0]} scenes", total=count, unit="scene", leave=False))
    write_data_set(args.out.resolve(), names, splits)
    return names


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        names = write(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"compose_scenes: {error}") from error
    print(f"{args.train} + {args.val} scenes in {args.out}, {len(names)} classes: {', '.join(names)}")


if __name__ == "__main__":
    shared.interrupts.run(main)
