"""Time the choice of patches: scores + partition + layout against a ViT-B forward and against one-hot histograms.

    python tools/benchmark_partition.py [--size 1024] [--rounds 7]

Every figure comes from one run on real photos. Times are medians, with the fastest and the slowest round; memory is
the growth of the peak resident set, each measured in a fresh process.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import platform
import statistics
from collections.abc import Sequence

from shared.packages import needed_packages

with needed_packages("benchmark_partition"):
    import torch

    from apt_dense import PatchSelector

    from benchmarks.partition import (
        THRESHOLDS,
        choose_and_lay_out,
        forward,
        in_fresh_process,
        one_hot_scores,
        peak_growth,
        row,
        timed,
    )
    from benchmarks.photos import photos
    from shared.option_types import PIXELS, whole
    from shared.token_counts import choose_patches


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=whole(16, PIXELS), default=1024, help="pixels of a side (default: 1024)")
    parser.add_argument("--rounds", type=whole(1), default=7, help="rounds that count (default: 7)")
    options = parser.parse_args(argv)

    cheap = timed(choose_and_lay_out, THRESHOLDS, options.size, 3 * options.rounds)
    dear = timed(one_hot_scores, THRESHOLDS, options.size, min(3, options.rounds))
    uniform = timed(forward, (), options.size, options.rounds)
    reference = statistics.median(uniform)
    memory = [in_fresh_process(peak_growth, run, options.size) for run in (choose_and_lay_out, one_hot_scores)]

    found = choose_patches(PatchSelector(thresholds=THRESHOLDS), photos(options.size, 1))
    print(f"{options.size} x {options.size} photo, thresholds {THRESHOLDS}: "
          f"{found.per_scale.sum()} of {found.cells} tokens ({found.tokens_kept:.0%})")  # fmt: skip
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print("| step | median ms | fastest-slowest ms | share of the ViT-B forward | extra memory, MiB |")
    print("|---|---|---|---|---|")
    print(row("scores + partition + layout", cheap, reference, memory[0]))
    print(row("scores alone by one-hot histograms", dear, reference, memory[1]))
    print(row("ViT-B forward, all tokens", uniform, reference))
    print(f"{statistics.median(dear) / statistics.median(cheap):.0f} times the time, "
          f"{memory[1] / max(memory[0], 1):.0f} times the memory")  # fmt: skip


if __name__ == "__main__":
    with needed_packages("benchmark_partition"):
        shared.interrupts.run(main)
