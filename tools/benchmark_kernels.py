"""Time single kernels: a linear layer and the attention of one image, ours against PyTorch's.

    python tools/benchmark_kernels.py [--rows 2450] [--dim 768] [--heads 12] [--dtype bfloat16]

Relative positions are those of a square grid of at least that many cells. Variants take turns; times are medians, with
the fastest and the slowest round, and ratios are of medians, "x" = PyTorch's time / this one's. Those that
cannot run here give the reason.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
from collections.abc import Sequence

from shared.option_types import device, whole
from shared.packages import needed_packages

with needed_packages("benchmark_kernels"):
    import torch

    from benchmarks.kernels_to_compare import attention_variants, compare, linear_variants


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=whole(1), default=2450, help="tokens (default: 2450, of 4096 at 1024 pixels)")
    add("--dim", type=whole(1), default=768, help="channels (default: 768)")
    add("--heads", type=whole(1), default=12, help="(default: 12)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--rounds", type=whole(1), default=7, help="rounds that count (default: 7)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.dim % options.heads:
        raise SystemExit(f"benchmark_kernels: --dim {options.dim} must be a multiple of --heads {options.heads}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(0)
    print(f"{options.rows} rows, {options.dim} channels, {options.heads} heads, {options.dtype}, {options.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| what | variant | median ms (spread) | x PyTorch | note |\n|---|---|---|---|---|")
    for step, trains in (("forward", False), ("forward and backward", True)):
        print(*compare(f"linear layer, {step}", linear_variants(options, trains), options), sep="\n")
        for biased in (False, True):
            title = f"attention{' with relative positions' if biased else ''}, {step}"
            print(*compare(title, attention_variants(options, trains, biased), options), sep="\n", flush=True)


if __name__ == "__main__":
    with needed_packages("benchmark_kernels"):
        shared.interrupts.run(main)
