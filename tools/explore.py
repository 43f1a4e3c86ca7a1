"""Open a page with sliders: how thresholds or a token budget cut a photo of yours into patches.

    pip install -e ".[explore]"
    python tools/explore.py
    python tools/explore.py photo.jpg --size 1024 --patch-size 16 --port 7860

The page is served to this machine alone, at the address that is printed, until Ctrl-C. Photos that are dropped on it
stay here. It shows the patches, how many tokens are kept, the scores against the thresholds, and the speed-up that the
tokens promise: a count of operations of a plain ViT, not a measurement (tools/report.py --measure times).
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported

with needed_packages("explore"):
    import gradio
    import numpy as np

    from reporting.explored_photo import BY_BUDGET, BY_THRESHOLDS, Settings, explore_photo
    from reporting.predicted_speed import MODELS
    from shared.option_types import number, whole
    from shared.photo_files import read_photo

SIZES = 224, 2048  # pixels that the slider offers
BITS = 0.05, 9.0  # that the sliders offer; the highest entropy is 9
BUTTONS = ["fullscreen", "download"]  # of pictures, and none that would send one to anybody


def explore(photo: np.ndarray | None, *settings: object) -> tuple:
    """Answer a change of a control: patches, two score maps, figures."""
    if photo is None:
        return None, None, None, "<p>Give a photo.</p>"
    try:
        found = explore_photo(photo, Settings(*settings))
    except ValueError as error:
        raise gradio.Error(str(error)) from error
    return found.patches, *found.scores, str(found.figures)


def build(photo: np.ndarray | None, start: Settings) -> gradio.Blocks:
    """Build the page with a photo (H, W, 3) uint8 RGB, or none, and the settings that it starts with."""
    with gradio.Blocks(title="Adaptive patches", analytics_enabled=False) as page:
        gradio.Markdown("# Adaptive patches\nHow a photo is cut, and what that saves. Move a slider to see it change.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                sources = ["upload", "clipboard"]
                given = gradio.Image(photo, label="Your photo", sources=sources, height=260, buttons=BUTTONS)
                controls = _controls(start)
            with gradio.Column(scale=2, min_width=320):
                patches = _picture("Its patches")
                figures = gradio.HTML()
        with gradio.Row():
            scores = [_picture(f"Scores of patches {size} as large") for size in ("twice", "four times")]
        shown = [patches, *scores, figures]
        changes = [page.load, given.change, *(control.change for control in controls)]
        gradio.on(changes, explore, [given, *controls], shown, api_name="explore", show_progress="hidden",
                  trigger_mode="always_last")  # fmt: skip
    return page


def serve(page: gradio.Blocks, port: int | None = None) -> str:
    """Start to serve the page to this machine, in fonts of the machine, so that nothing is loaded from elsewhere.

    Returns:
        Its address.

    Raises:
        OSError: for a port that is taken.
    """
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # Quiet, since its own words recommend a public link.
    page.launch(
        server_name="127.0.0.1", server_port=port, share=False, theme=theme, quiet=True, prevent_thread_lock=True
    )
    return page.local_url


def _picture(label: str) -> gradio.Image:
    return gradio.Image(label=label, interactive=False, min_width=300, format="jpeg", buttons=BUTTONS)


def _controls(start: Settings) -> list:
    """One control for each field of ``Settings``, in their order."""
    slider = gradio.Slider
    return [
        gradio.Radio([BY_THRESHOLDS, BY_BUDGET], value=start.by, label="Patches are chosen by"),
        slider(*BITS, start.first, step=0.05, label="Threshold for patches of 2 times the patch size, bits"),
        slider(*BITS, start.second, step=0.05, label="Threshold for patches of 4 times the patch size, bits"),
        slider(10, 100, start.budget, step=1, label="Token budget, % of all"),
        slider(4, 32, start.patch_size, step=1, label="Patch size, pixels"),
        slider(*SIZES, start.longer, step=16, label="Longer side of the photo in the model, pixels"),
        gradio.Dropdown(list(MODELS), value=start.model, label="ViT whose speed is predicted"),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photo", type=Path, nargs="?", help="photo to start with")
    bits = number(least=BITS[0], below=BITS[1])
    add("--thresholds", type=bits, nargs=2, default=(5.5, 4.0), metavar="T", help="to start with (default: 5.5 4.0)")
    add("--patch-size", type=whole(4, 32), default=16, metavar="P", help="to start with (default: %(default)s)")
    add("--size", type=whole(*SIZES), default=768, metavar="N", help="longer side to start with (default: %(default)s)")
    add("--port", type=whole(1, 65_535), metavar="N", help="of the server (default: the first free one from 7860 on)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        photo = None if args.photo is None else read_photo(args.photo)
    except (ValueError, OSError) as error:
        sys.exit(f"explore: {error}")
    start = Settings(BY_THRESHOLDS, *args.thresholds, 60, args.patch_size, args.size, "base")
    page = build(photo, start)
    try:
        address = serve(page, args.port)
    except OSError:
        sys.exit(f"explore: no port can be had (--port {args.port}); give another one, or none")
    print(f"{address} shows the page until Ctrl-C", flush=True)
    page.block_thread()


if __name__ == "__main__":
    with needed_packages("explore"):
        shared.interrupts.run(main)
