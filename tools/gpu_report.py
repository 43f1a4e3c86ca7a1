"""One call on a machine with a GPU: the tests that need one, the benchmark's tables for ViT-L, and the kernels.

    python tools/gpu_report.py --out gpu                  # writes gpu.csv and gpu.md, in ten minutes at most
    python tools/gpu_report.py --out gpu --minutes 20

What there is no time left for is listed on the page instead of being left out silently; the most telling settings come
first. A setting that fails keeps its reason in the table.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.packages import needed_packages

with needed_packages("gpu_report"):
    import benchmark
    import benchmark_kernels
    import torch

    from apt_dense.weights.files import write_text_whole

    from benchmarks.table import Row, Setting, table, write_csv
    from shared.machine_and_versions import environment
    from shared.option_types import number

ROOT = Path(__file__).resolve().parents[1]
_COMMON = "--dtype bfloat16 --keep 0.6 --rounds 5 --skip mmseg"
#: Options of tools/benchmark.py, the most telling first.
GROUPS = (
    "--model vit-l --sizes 1024 --batches 1 8 --steps inference training --budget 0.6",
    "--model vitdet-l --sizes 1024 --batches 1 --steps inference training --budget 0.6",
    "--model vit-l --sizes 1024 --batches 1 --budget 0.6 --compile",  # the budget by CUDA graphs
    "--model vit-l --sizes 1536 --batches 1 4 --steps inference training",
    "--model vitdet-l --sizes 1536 --batches 1 --steps inference training",
    "--scope detector --model vitdet-b --sizes 1024 --batches 1 --steps inference training",
    "--model vit-l --sizes 1024 --batches 2 4 --steps inference training",
)
KERNELS = (
    "--rows 2450 --dim 1024 --heads 16 --dtype bfloat16",
    "--rows 5500 --dim 1024 --heads 16 --dtype bfloat16",
)


class Work(NamedTuple):
    """A part of the run: its title, and what does it."""

    title: str
    run: Callable[[], str | list[Row]]


def benchmark_work(group: str, device: str) -> list[Work]:
    """Return the settings of a group one by one, so that time can run out between them."""
    options = benchmark.parse([*group.split(), *_COMMON.split(), "--device", device])
    benchmark.check(options)

    def compare(setting: Setting) -> list[Row]:
        torch.manual_seed(0)
        return benchmark.compare(setting, options)

    return [Work(_title(s), lambda s=s: compare(s)) for s in benchmark.settings(options)]


def _title(setting: Setting) -> str:
    compiled = ", compiled" if "compile" in setting.options else ""
    return f"{setting.model} {setting.scope}, {setting.step}, {setting.batch} x {setting.size}{compiled}"


def kernel_table(arguments: str, device: str) -> str:
    """Return what tools/benchmark_kernels.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        benchmark_kernels.main([*arguments.split(), "--device", device])
    head, *lines = printed.getvalue().splitlines()
    return "\n".join([head, "", *lines])


def run_tests() -> str:
    """Run the tests marked ``cuda`` in a process of their own; return their last lines."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:warnings", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    return "```\n" + "\n".join(lines[-40:] if done.returncode else lines[-1:]) + "\n```"


def everything(device: str) -> list[Work]:
    """List the whole run in its order."""
    work = [Work("tests marked cuda", run_tests)]
    work += benchmark_work(GROUPS[0], device)
    work += [Work(f"kernels, {arguments}", lambda a=arguments: kernel_table(a, device)) for arguments in KERNELS]
    return work + [part for group in GROUPS[1:] for part in benchmark_work(group, device)]


def run(work: Sequence[Work], out: Path, seconds: float, title: str) -> None:
    """Run the parts while there is time, and write OUT.csv and OUT.md after each."""
    stop = time.monotonic() + seconds
    rows: list[Row] = []
    texts: list[str] = []
    for number, part in enumerate(work):
        left_out = [other.title for other in work[number:]]
        write(out, title, rows, texts, left_out)
        if time.monotonic() >= stop:
            return
        started = time.monotonic()
        try:
            found = part.run()
        except Exception as error:  # a fault of one part must not cost the machine's time for the others
            found = f"failed: {type(error).__name__}: {error}"
        rows += found if isinstance(found, list) else []
        texts += [f"## {part.title}\n\n{found}"] if isinstance(found, str) else []
        print(f"{part.title}: {time.monotonic() - started:.0f} s", flush=True)
    write(out, title, rows, texts, [])


def write(out: Path, title: str, rows: Sequence[Row], texts: Sequence[str], left_out: Sequence[str]) -> None:
    """Write what was found so far."""
    write_csv(rows, out.with_suffix(".csv"))
    parts = [f"# {title}", *texts, "## Backbones and detectors", table(rows)]
    parts += ["## No time was left for", "\n".join(f"- {title}" for title in left_out)] if left_out else []
    write_text_whole(out.with_suffix(".md"), "\n\n".join(parts) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.csv and OUT.md")
    parser.add_argument(
        "--minutes", type=number(above=0), default=9, help="start nothing after these (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_report: PyTorch finds no GPU (torch.cuda.is_available() is False)")
    torch.backends.cuda.matmul.allow_tf32 = True
    run(everything("cuda"), options.out, 60 * options.minutes, environment(torch.device("cuda")))
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with needed_packages("gpu_report"):
        shared.interrupts.run(main)
