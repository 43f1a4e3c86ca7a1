"""See how the patches of a video change from frame to frame, and what memory of earlier frames does about it.

    python tools/compare_frames.py photo.jpg --out frames/
    python tools/compare_frames.py my_video/ --out frames/ --thresholds 6 4.5

INPUT is a folder with the frames of a video (photos of one size, in the order of their names), or a photo. Of a photo,
two videos are made, both with a camera's noise: one camera stands still while a square passes, the other pans. OUT gets
frames.csv and frames.png: the share of tokens in each frame, and of the cells that are in patches of another size than
in the frame before; once with each frame cut by itself, once with scores kept where nothing moved
(apt_dense.patches.frame_scores.FrameScorer, which a model takes as its scorer).
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("compare_frames"):
    import numpy as np
    from tqdm import tqdm
    from visualize import selector_of

    from shared.option_types import PIXELS, SCORER_HELP, number, whole
    from shared.photo_files import find_photos, read_photo
    from video.compare_memory import cut_frames, describe, draw, write_csv
    from video.synthetic_frames import panning_camera, still_camera, with_noise


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="folder of frames, or a photo")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--tolerance", type=number(least=0), default=2.0, metavar="LEVELS", help="grey levels (default: %(default)s)")
    add("--thresholds", type=float, nargs="+", metavar="T", help="(default: 5.5 4.0)")
    add("--scorer", metavar="NAME|FILE", help=SCORER_HELP)
    add("--patch-size", type=whole(1, PIXELS), metavar="P", help="pixels of the smallest patches (default: 16)")
    add("--frames", type=whole(2), default=30, metavar="N", help="made of a photo (default: %(default)s)")
    add("--step", type=whole(1), default=4, metavar="PIXELS", help="of what moves, a frame (default: %(default)s)")
    add(
        "--noise", type=number(least=0), default=2.0, metavar="LEVELS", help="standard deviation (default: %(default)s)"
    )
    return parser.parse_args(argv)


def videos_of(options: argparse.Namespace) -> dict[str, Iterable[np.ndarray]]:
    """The frames of each video. Raises ValueError, OSError."""
    if options.input.is_dir():
        photos = find_photos([options.input])
        if len(photos) < 2:
            raise ValueError(f"{options.input} holds {len(photos)} photo; expected at least two frames of a video")
        return {options.input.name: map(read_photo, photos)}
    photo = read_photo(options.input)
    return {
        "still camera": with_noise(still_camera(photo, options.frames, options.step), options.noise),
        "panning camera": with_noise(panning_camera(photo, options.frames, options.step), options.noise),
    }


def compare(options: argparse.Namespace) -> str:
    """Cut all frames, write the results, return the table. Raises ValueError, TypeError, OSError."""
    selector, videos = selector_of(options, None), videos_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        name: cut_frames(tqdm(frames, name, unit="frame", total=None), selector, options.tolerance)
        for name, frames in videos.items()
    }
    write_csv(found, options.out / "frames.csv")
    draw(found, options.out / "frames.png")
    return describe(found)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        print(compare(options))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"compare_frames: {error}")


if __name__ == "__main__":
    with needed_packages("compare_frames"):
        shared.interrupts.run(main)
