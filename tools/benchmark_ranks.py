"""Measure how long the processes of a real training wait for each other, with and without balanced tokens.

    python tools/benchmark_ranks.py --out ranks/seg --data ade 40 256 seg configs/mmseg/CONFIG.py --max-iters 60 \\
        --allow-empty-classes --cfg-options train_dataloader.batch_size=1
    python tools/benchmark_ranks.py --out ranks/det --data coco 40 256 det --config-file configs/detectron2/CONFIG.py \\
        dataloader.train.total_batch_size=2 train.max_iter=60

What follows "seg" or "det" is the command line of tools/train_seg.py or tools/train_det.py, without the folder of the
run. It is run twice on the CPUs of this machine, in --processes processes of as many threads as OMP_NUM_THREADS says:
in random order, then with --balance. --data makes and uses a data set of pictures in that number and of that side, half
of them flat, half noise; without it, name yours with --data-root.

OUT/times.md says how long a step took, how much of it was waiting, how much of the waiting balance removed, and what
tools/simulate_scaling.py says of both, with the cost curve of the run in random order (curve.csv, for --curve). Take
turns with nothing else on the machine: other programs make processes wait, too.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from shared.packages import needed_packages

with needed_packages("benchmark_ranks"):
    import torch

    from apt_dense.hosts.token_counts import read_counts
    from apt_dense.weights.files import write_text_whole

    from scaling.contrast_data import write_ade, write_coco
    from scaling.cost_curve import fit_curve, write_points
    from scaling.rank_times import RankTimes, free_port, read_times, record_process, run_processes
    from scaling.step_times import Setup, balanced_steps, shuffled_steps, step_times
    from shared.machine_and_versions import environment

WRITERS = {"ade": write_ade, "coco": write_coco}
KINDS = "random", "balanced"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and both runs")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps that do not count (default: %(default)s)")
    parser.add_argument("--data", nargs=3, metavar=("LAYOUT", "N", "SIDE"), help="make a data set: ade or coco")
    parser.add_argument("host", choices=("seg", "det"), help="the trainer")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its command line")
    options = parser.parse_args(argv)
    if options.processes < 2 or options.warm_up < 0:
        parser.error("--processes must be at least 2, --warm-up at least 0")
    if options.data and (options.data[0] not in WRITERS or not all(one.isdigit() for one in options.data[1:])):
        parser.error(f"--data {' '.join(options.data)}: expected ade or coco, and two whole numbers")
    return options


def command_of(options: argparse.Namespace, kind: str) -> list[str]:
    """Return the trainer's arguments for a run."""
    first = ["--data-root", str(options.out / "data")] if options.data else []
    first += ["--balance", str(options.out / "tokens.json")] if kind == "balanced" else []
    if options.host == "det":  # overrides come last; compression of gradients takes the place of the clock
        last = [f"train.output_dir={options.out / kind}", "train.ddp.fp16_compression=False"]
        return [*first, *options.arguments, *last]
    return [*options.arguments[:1], *first, "--work-dir", str(options.out / kind), *options.arguments[1:]]


def start_seg(argv: Sequence[str], processes: int, port: int, rank: int) -> None:
    """Be one process of a training, as torchrun starts them."""
    import train_seg

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    train_seg.main([argv[0], "--launcher", "pytorch", *argv[1:]])


def start_det(argv: Sequence[str], processes: int, port: int, rank: int) -> None:
    """Be one process of a training, as Detectron2's launch starts them."""
    import train_det
    from detectron2.engine.launch import _distributed_worker

    args, address = train_det.parse_args(argv), f"tcp://127.0.0.1:{port}"
    _distributed_worker(rank, train_det.main_worker, processes, processes, 0, address, (args,))


def train(options: argparse.Namespace, kind: str) -> RankTimes:
    """Run a training in its processes and read their times. Raises ValueError."""
    records = [options.out / f"{kind}.{rank}.jsonl" for rank in range(options.processes)]
    start: Callable = start_seg if options.host == "seg" else start_det
    ready = partial(start, command_of(options, kind), options.processes, free_port())
    ended = run_processes(lambda rank: record_process(partial(ready, rank), records[rank]), options.processes)
    if any(ended):
        raise ValueError(
            f"the training in {options.out / kind} ended with the statuses {ended}; see what it said above"
        )
    return read_times(records, options.warm_up)


def predict(options: argparse.Namespace, times: dict[str, RankTimes]) -> dict[str, tuple[float, float]]:
    """Simulate both runs with the costs of the one in random order: seconds per step and waste of each."""
    points = times["random"].tokens.ravel().tolist(), times["random"].own.ravel().tolist()
    write_points(options.out / "curve.csv", *points)
    curve, (tokens, _) = fit_curve(*points), read_counts(options.out / "tokens.json")
    per_batch = times["random"].tokens.mean() / (sum(tokens) / len(tokens))
    setup = Setup(options.processes, max(1, round(per_batch)))
    orders = shuffled_steps(len(tokens), setup, 0), balanced_steps(tokens, setup, 0)
    return {kind: step_times(curve, tokens, order, setup, 2000)[:2] for kind, order in zip(KINDS, orders, strict=True)}


def describe(times: dict[str, RankTimes], predicted: dict[str, tuple[float, float]]) -> str:
    """Return the result in Markdown."""
    lines = ["| order | steps | s per step | waiting | predicted s per step | off by | predicted waiting |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for kind, measured in times.items():
        seconds, waste = predicted[kind]
        lines.append(
            f"| {kind} | {len(measured.own)} | {measured.seconds:.4g} | {measured.waste:.1%} | {seconds:.4g} | "
            f"{seconds / measured.seconds - 1:+.1%} | {waste:.1%} |"
        )
    removed = 1 - times["balanced"].waited.mean() / times["random"].waited.mean()
    lines += ["", f"Balance removed {removed:.1%} of the waiting. {environment(torch.device('cpu'))}."]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> str:
    """Train twice and compare. Raises ValueError, OSError."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data:
        layout, images, side = options.data
        WRITERS[layout](options.out / "data", int(images), int(side))
    times = {kind: train(options, kind) for kind in KINDS}
    text = describe(times, predict(options, times))
    write_text_whole(options.out / "times.md", text + "\n")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark_ranks: {error}")


if __name__ == "__main__":
    with needed_packages("benchmark_ranks"):
        shared.interrupts.run(main)
