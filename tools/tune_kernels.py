"""Measure which attention kernel and which matrix products are the fastest on this machine, for "auto" to take.

    python tools/tune_kernels.py            # measures, for some four minutes, on a machine that does nothing else
    python tools/tune_kernels.py --show     # prints what "auto" takes and why, measures nothing
    python tools/tune_kernels.py --forget   # deletes what was measured

Without measurements "auto" goes by facts about the processor, known for AMD's and Intel's; on others it takes PyTorch's
own kernels. What is measured is kept in the user's cache, for this processor, number of threads and version
of PyTorch, and read by every later process. A kernel that is not clearly faster than PyTorch's is not taken.
Nothing is taken before all is measured; interrupted, the same command continues.

All kernels give the same values up to rounding, so that changing the choice in the middle of a training changes its
losses in the last digits only; do not tune between a run and the one that resumes it if they must not.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("tune_kernels"):
    import torch
    from tqdm import tqdm

    from apt_dense.ops.attention import choose
    from apt_dense.ops.measured_kernel_choice import (
        Case,
        Seconds,
        fastest,
        format_times,
        parse_times,
        times_of_machine,
        timings_path,
    )
    from apt_dense.ops.onednn_matmul import PRODUCTS, is_faster
    from apt_dense.runtime import describe_machine
    from apt_dense.weights.files import write_text_whole

    from benchmarks.kernel_timings import all_cases, attention_inputs, table, time_case


def chosen(case: Case) -> tuple[str, str]:
    """Return what "auto" takes in a case, and why."""
    if case.work == "linear":
        taken, known = PRODUCTS[is_faster(case.trains)], fastest(case, "pytorch", PRODUCTS)
    else:
        taken, known = choose(attention_inputs(case)[0]), fastest(case, "sdpa", ("sdpa",))
    return taken, "measured here" if known else "a fact about the processor"


def measure(rounds: int, partial: Path) -> dict[str, dict[str, Seconds]]:
    """Time all cases but those that an interrupted run left in ``partial``, which is theirs until all are measured."""
    torch.manual_seed(0)
    times = _left_in(partial)
    for case in tqdm(all_cases(), "cases"):
        if case.key not in times:
            times[case.key] = time_case(case, rounds)
            write_text_whole(partial, format_times(times, torch.get_num_threads()))
    return times


def _left_in(partial: Path) -> dict[str, dict[str, Seconds]]:
    try:
        return dict(parse_times(partial.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # none, or damaged: measured again
        return {}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--show", action="store_true", help='print what "auto" takes and why; measure nothing')
    which.add_argument("--forget", action="store_true", help="delete what was measured on this machine")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch's (default: its own choice)")
    options = parser.parse_args(argv)
    if options.rounds < 3:
        raise SystemExit(f"tune_kernels: --rounds {options.rounds}: expected at least 3, of which quartiles are taken")
    if options.threads is not None and options.threads < 1:
        raise SystemExit(f"tune_kernels: --threads {options.threads}: expected at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    path = timings_path(threads)
    partial = path.with_suffix(".partial")
    if options.forget:
        path.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    elif not options.show:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(path, format_times(measure(options.rounds, partial), threads))
        partial.unlink()
    times_of_machine.cache_clear()
    print(f"{describe_machine()}, {threads} threads, torch {torch.__version__}")
    print(f"measured: {path if path.is_file() else 'nothing'}")
    print(*table(times_of_machine(threads), chosen), sep="\n")


if __name__ == "__main__":
    with needed_packages("tune_kernels"):
        shared.interrupts.run(main)
