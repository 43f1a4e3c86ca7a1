"""Say which parts of a model a training step's time goes to, for a config of MMSegmentation or Detectron2, or a model
of train_det_torchvision.

    python tools/profile_step.py seg configs/mmseg/upernet_apt_vit-b16_160k_ade20k-512x512.py
    python tools/profile_step.py det configs/detectron2/mask_rcnn_apt_vitdet_b_100ep.py --keep 0.6 --depth 3
    python tools/profile_step.py torchvision vit_base vit_base_patch16_224@768

Weights are random, photos those inside scikit-image at the config's size, labels drawn at random: no data is needed.
The step is one forward and backward pass and one of AdamW; the medians of several are printed, each part without those
inside of it, and the package that defines it; what is left is in the line of the model itself. The backbone's own line
is scores, partition, layout and gathers; heads on tokens scatter in their own.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import os
import statistics
import sys
from collections.abc import Sequence

from shared.option_types import number, whole
from shared.packages import needed_packages

with needed_packages("profile_step"):
    import torch
    from tqdm import tqdm

    from benchmarks.recipes import STEPS
    from benchmarks.step_parts import Part, Step, parts_of_step
    from shared.machine_and_versions import environment
    from shared.tables import markdown

COLUMNS = {"part": "{}", "of": "{}", "forward ms": "{:.0f}", "backward ms": "{:.0f}", "share": "{:.1%}"}
_LEAST = 0.001  # share of the step below which a part is not listed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("host", choices=STEPS, help="seg: MMSegmentation, det: Detectron2")
    add("config", nargs="+", help="one or several; with torchvision NAME or NAME@SIZE, as in vit_base@1024")
    add("--batch", type=whole(1), default=2, help="photos (default: 2; with 1, batch norm of pooled maps fails)")
    add(
        "--keep",
        type=number(above=0),
        metavar="SHARE",
        help="scale the thresholds so that this share of tokens is kept",
    )
    add("--depth", type=whole(1), default=2, help="of the paths of modules (default: 2)")
    add("--rounds", type=whole(1), default=3, help="steps that count (default: 3)")
    return parser.parse_args(argv)


def profile(step: Step, rounds: int, depth: int) -> list[Part]:
    """Medians over steps, after one that does not count."""
    optimizer = torch.optim.AdamW(step.model.parameters(), lr=1e-5)
    found = [parts_of_step(step, optimizer, depth) for _ in tqdm(range(rounds + 1), "steps", leave=False)][1:]
    by_name = [{part.name: part for part in parts} for parts in found]
    names = dict.fromkeys(part.name for parts in found for part in parts)
    return [_median([parts[name] for parts in by_name if name in parts], rounds) for name in names]


def _median(same: Sequence[Part], rounds: int) -> Part:
    """Of one part; in rounds that did not need it, it took no time."""
    absent = [0.0] * (rounds - len(same))
    times = (statistics.median([*(getattr(part, way) for part in same), *absent]) for way in ("forward", "backward"))
    return Part(*same[0][:2], *times)


def rows_of(parts: Sequence[Part]) -> list[dict]:
    """Lines of the table: the total, and the parts that take more than a thousandth of it."""
    total = sum(part.forward + part.backward for part in parts)
    own = Part("all", "", sum(part.forward for part in parts), sum(part.backward for part in parts))
    lines = [(part, (part.forward + part.backward) / total) for part in (own, *parts)]
    return [dict(zip(COLUMNS, (*part, share), strict=True)) for part, share in lines if share >= _LEAST]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    for config in options.config:
        torch.manual_seed(0)
        try:
            step, share = STEPS[options.host](config, options.batch, options.keep)
            rows = rows_of(profile(step, options.rounds, options.depth))
        except (OSError, ValueError) as error:
            sys.exit(f"profile_step: {error}")
        print(f"{config}: {options.batch} photos, {share:.0%} of the tokens, {environment(torch.device('cpu'))}\n")
        print(markdown(rows, COLUMNS), "\n", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs its own steps
    with needed_packages("profile_step"):
        shared.interrupts.run(main)
