"""Run the main job in one command: demo data, adaptive and uniform models, figures and pictures.

    python tools/quickstart.py [--out demo] [--short] [--force] [--only segmentation|detection]

Composes labelled scenes from the photographs inside scikit-image; trains a small adaptive ViT and its uniform twin for
the same number of iterations, for segmentation with MMSegmentation and then, from those backbones, for detection with
torchvision; evaluates and times both; and runs them on whole photos. Leaves OUT/results.md, OUT/results.csv,
OUT/contact_sheet.png and OUT/detections.png. Each stage takes a line; what the hosts log is in its folder,
OUT/STAGE/log.txt. An interrupted run continues with the stage it was in.
"""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

import argparse
import csv
import io
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.log_on_terminal import quiet

try:
    with quiet():
        from apt_dense.weights.files import write_text_whole

        from demo import TWINS
        from demo import detection as det
        from demo import segmentation as seg
        from demo.resumable_stages import Record
except ImportError as error:
    sys.exit(f'quickstart: {error}; install what it needs with  pip install -e ".[mmseg,demo]"')

Rows = list[tuple[str, list[float]]]  # name and values for uniform, adaptive


def segmentation_rows(done: Mapping[str, Record]) -> Rows:
    trained = [done[twin].results for twin in TWINS]
    timed = [done["speed"].results[twin] for twin in TWINS]
    return [
        ("mIoU", [twin["mIoU"] for twin in trained]),
        ("tokens kept, test", [twin["tokens, test"] for twin in timed]),
        ("train images/s", [twin["train images/s"] for twin in trained]),
        ("test images/s", [twin["test images/s"] for twin in timed]),
    ]


def detection_rows(done: Mapping[str, Record]) -> Rows:
    results = [done[twin].results for twin in TWINS]
    names = ("AP", "AP50", "mask AP", "mask AP50", "tokens", "train images/s", "test images/s")
    return [("tokens kept, test" if name == "tokens" else name, [r[name] for r in results]) for name in names]


def as_markdown(title: str, rows: Rows) -> str:
    """Format a table with the ratio of adaptive to uniform."""
    lines = [f"## {title}", "", "| | uniform | adaptive | ratio |", "|---|---|---|---|"]
    for name, (uniform, adaptive) in rows:
        ratio = f"{adaptive / uniform:.2f}" if uniform else "-"
        lines.append(f"| {name} | {_number(name, uniform)} | {_number(name, adaptive)} | {ratio} |")
    return "\n".join(lines) + "\n"


def _number(name: str, value: float) -> str:
    return f"{value:.0%}" if name.startswith("tokens") else f"{value:.3f}" if "AP" in name else f"{value:.1f}"


def as_csv(tables: Mapping[str, Rows]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("task", "figure", "uniform", "adaptive"))
    for task, rows in tables.items():
        writer.writerows((task, name, *values) for name, values in rows)
    return text.getvalue()


def run(out: Path, short: bool, force: bool, only: str | None) -> dict[str, Rows]:
    """Run what is not finished yet; return the figures of each task."""
    tables = {}
    done = seg.run_segmentation(out, seg.SHORT if short else seg.Plan(), force, only != "detection")
    if only != "detection":
        tables["Segmentation"] = segmentation_rows(done)
        shutil.copy(done["sheet"].folder / "contact_sheet.png", out)
    if only != "segmentation":
        found = det.run_detection(out, done["data"].folder / "scenes", done, det.SHORT if short else det.PLAN, force)
        tables["Detection"] = detection_rows(found)
        shutil.copy(found["sheet"].folder / "detections.png", out)
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of everything (default: demo)")
    parser.add_argument("--short", action="store_true", help="a tenth of the work: it all runs, nothing learns")
    parser.add_argument("--force", action="store_true", help="do finished stages again")
    parser.add_argument(
        "--only",
        choices=["segmentation", "detection"],
        help="one half; detection trains the segmentors, too, that it starts from",
    )
    options = parser.parse_args(argv)

    start = time.perf_counter()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tables = run(options.out, options.short, options.force, options.only)
    except (ValueError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command continues with the stage it was in") from None
    text = "\n".join(as_markdown(title, rows) for title, rows in tables.items())
    write_text_whole(options.out / "results.md", text)
    write_text_whole(options.out / "results.csv", as_csv(tables))
    print(f"\n{text}\n{time.perf_counter() - start:.0f} s. Figures: {options.out / 'results.md'}; "
          f"pictures: {', '.join(str(p) for p in sorted(options.out.glob('*.png')))}")  # fmt: skip


if __name__ == "__main__":
    shared.interrupts.run(main)
