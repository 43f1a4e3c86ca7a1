"""Time, memory and FLOPs of the adaptive backbone, its uniform twin and dense baselines, in one run on real photos.

    python tools/benchmark.py --model vitdet-b --sizes 1024 --keep 0.6
    python tools/benchmark.py --model vit-b --steps inference training --sizes 512 1024 --csv results.csv --plot plot.png

Variants take turns in every round, so that a busy machine slows all of them. Reported are the median and the spread
of the rounds, ratios to the slowest-changing references (the baseline and the uniform twin of the same run), and
efficiency = (time ratio to the twin) / (FLOP ratio to the twin), FLOPs counted on these very photos.
"""

import argparse
import csv
import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark_models import Variant, build_variants
from benchmark_photos import photos, thresholds_for
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


class Row(NamedTuple):
    variant: str
    model: str
    step: str
    size: int
    batch: int
    dtype: str
    tokens: float  # share of all tokens
    seconds: float  # median
    fastest: float
    slowest: float
    of_baseline: float  # baseline's time / this time
    of_twin: float  # uniform twin's time / this time
    gflops: float
    efficiency: float
    memory_mib: float  # growth of the peak
    environment: str


def step_of(variant: Variant, images: Tensor, step: str, dtype: torch.dtype) -> None:
    """One inference or one forward and backward pass, under autocast for other types than float32."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        if step == "inference":
            with torch.inference_mode():
                variant.run(images)
            return
        loss = variant.run(images).float().square().mean()
    loss.backward()
    variant.module.zero_grad(set_to_none=True)


def seconds_of(variant: Variant, images: Tensor, step: str, dtype: torch.dtype) -> float:
    _wait(images.device)
    start = time.perf_counter()
    step_of(variant, images, step, dtype)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(variant: Variant, images: Tensor, step: str, dtype: torch.dtype) -> float:
    """MiB by which one step raises the peak: of the device, or of the process (Linux)."""
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step_of(variant, images, step, dtype)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = _resident("VmHWM")
    step_of(variant, images, step, dtype)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def gflops_of(variant: Variant, images: Tensor, step: str, dtype: torch.dtype) -> float:
    with FlopCounterMode(display=False) as counter:
        step_of(variant, images, step, dtype)
    return counter.get_total_flops() / 1e9


def environment(device: torch.device) -> str:
    """What a figure depends on, beside the code."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def compare(model: str, size: int, batch: int, step: str, options: argparse.Namespace) -> list[Row]:
    """Rows of all variants at one setting."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    images = photos(size, batch).to(device)
    thresholds = tuple(options.thresholds)
    if options.keep is not None:
        thresholds = thresholds_for(images, thresholds, options.keep)
    variants = build_variants(model, size, thresholds, device)
    for variant in variants:
        variant.module.train(step == "training")
    times = _take_turns(variants, images, step, dtype, options.rounds)
    gflops = [gflops_of(variant, images, step, dtype) for variant in variants]
    memory = [memory_of(variant, images, step, dtype) for variant in variants]
    medians = [statistics.median(t) for t in times]
    return [
        Row(
            variant.name, model, step, size, batch, options.dtype,
            tokens=variant.tokens(images) / (batch * (size // 16) ** 2),
            seconds=medians[i],
            fastest=min(times[i]),
            slowest=max(times[i]),
            of_baseline=medians[-1] / medians[i],
            of_twin=medians[0] / medians[i],
            gflops=gflops[i],
            efficiency=(medians[0] / medians[i]) / (gflops[0] / gflops[i]),
            memory_mib=memory[i],
            environment=environment(device),
        )
        for i, variant in enumerate(variants)
    ]  # fmt: skip


def _take_turns(
    variants: list[Variant], images: Tensor, step: str, dtype: torch.dtype, rounds: int
) -> list[list[float]]:
    """Seconds of every round for each variant, after a round that does not count."""
    times = [[] for _ in variants]
    for count in tqdm(range(rounds + 1), f"{step} {tuple(images.shape)}", leave=False):
        for variant, seconds in zip(variants, times, strict=True):
            elapsed = seconds_of(variant, images, step, dtype)
            if count:
                seconds.append(elapsed)
    return times


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        f"{rows[0].environment}",
        "",
        "| variant | model | step | size | batch | type | tokens | median s (spread) | x baseline | x twin | GFLOP "
        "| efficiency | memory MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.variant} | {r.model} | {r.step} | {r.size} | {r.batch} | {r.dtype} | {r.tokens:.0%} "
        f"| {r.seconds:.3f} ({r.fastest:.3f}-{r.slowest:.3f}) | {r.of_baseline:.2f} | {r.of_twin:.2f} "
        f"| {r.gflops:.0f} | {r.efficiency:.2f} | {r.memory_mib:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def write_csv(rows: list[Row], path: Path) -> None:
    """Write beside, then rename, so that a broken run leaves no half table."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    partial.replace(path)


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory against image size, one line per variant and step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant, step in dict.fromkeys((r.variant, r.step) for r in rows):
        line = [r for r in rows if (r.variant, r.step) == (variant, step)]
        label = variant if len({r.step for r in rows}) == 1 else f"{variant}, {step}"
        for axis, values in zip(axes, ([r.seconds for r in line], [r.memory_mib for r in line]), strict=True):
            axis.plot([r.size for r in line], values, marker="o", label=label)
    for axis, name in zip(axes, ("seconds, median", "peak memory growth, MiB"), strict=True):
        axis.set(xlabel="image side, pixels", ylabel=name, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{rows[0].model}, batch {rows[0].batch}, {rows[0].dtype}\n{rows[0].environment}", fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vitdet-b", help="vit-b, vit-l, vit-h, vitdet-b, ... (default: vitdet-b)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="sides of the square photos, pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", nargs="+", choices=["inference", "training"], default=["inference"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[5.5, 4.0])
    parser.add_argument("--keep", type=float, help="scale the thresholds so that this share of tokens is kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="draw time and memory against size there (PNG)")
    options = parser.parse_args(argv)

    rows = []
    for size in options.sizes:
        for batch in options.batches:
            for step in options.steps:
                rows += compare(options.model, size, batch, step, options)
    print(table(rows))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
