"""Write a small segmentation and detection data set made of real photographs, for trying things out.

    python tools/make_demo_data.py data/demo                    # photographs that scikit-image ships: no download
    python tools/make_demo_data.py data/demo --images my_photos # each photograph becomes one class

What comes out (ADE20K's layout, and the same scenes as COCO instances):

    data/demo/classes.txt                                       one name a line: line n is label n, 1 the background
    data/demo/images/{training,validation}/scene_00000.jpg
    data/demo/annotations/{training,validation}/scene_00000.png uint8; 0 = ignored, n = class n (reduce_zero_label=True)
    data/demo/coco/annotations/instances_{train,val}.json       category c is label c + 1, background is none

A scene depends on the seed, the split, its number, the size and the photographs, not on how many scenes are made. The
same versions of OpenCV and NumPy write the same bytes.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("make_demo_data"):
    from demo.dataset import make_demo_data


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--images", type=Path, metavar="DIR", help="use the photographs of this folder")
    parser.add_argument("--train", type=int, default=200, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=40, help="validation scenes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="mean side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace OUT if an earlier run of this tool wrote it")
    arguments = parser.parse_args(argv)
    try:
        names = make_demo_data(**vars(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"make_demo_data: {error}") from error
    print(f"{arguments.train} + {arguments.val} scenes in {arguments.out}, {len(names)} classes: {', '.join(names)}")


if __name__ == "__main__":
    shared.interrupts.run(main)
