"""A tool without its packages ends with one line that says how to install them, and exit status 1."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from shared.packages import INSTALL, needed_packages
from support.fresh_python import run_fresh

ROOT = Path(__file__).parents[2]

#: Runs a tool in a Python that cannot import a package; what has imported it already keeps it.
HIDE = """
import sys, runpy
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
for name in [name for name in sys.modules if name.split(".")[0] == {hidden!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Hidden())
sys.argv = [{tool!r}, *{arguments!r}]
sys.path.insert(0, {folder!r})
runpy.run_path({tool!r}, run_name="__main__")
"""

CASES = [
    *(("train_seg", package) for package in ("mmengine", "mmseg", "mmcv")),
    *(("eval_seg", package) for package in ("mmengine", "mmseg", "mmcv")),
    *(("train_det", package) for package in ("detectron2", "omegaconf", "pycocotools", "fvcore")),
    *(("train_det_torchvision", package) for package in ("pycocotools", "cv2", "tqdm")),
    *(("make_demo_data", package) for package in ("cv2",)),
    *(("visualize", package) for package in ("cv2", "tqdm")),
    ("predict", "tqdm"),
    ("report", "tqdm"),
    ("explore", "gradio"),
    ("benchmark", "tqdm"),
    ("check_identity", "cv2"),
    ("measure_accuracy", "cv2"),
    ("compare_scorers", "cv2"),
    ("prepare_camvid", "tqdm"),
    ("train_over_seeds", "tqdm"),
    ("simulate_scaling", "tqdm"),
    ("compare_frames", "tqdm"),
    ("benchmark_ranks", "cv2"),
]


def run(tool: str, hidden: str, *arguments: str) -> subprocess.CompletedProcess:
    path = ROOT / "tools" / f"{tool}.py"
    return run_fresh(HIDE.format(hidden=hidden, tool=str(path), arguments=arguments, folder=str(path.parent)))


@pytest.mark.parametrize(("tool", "package"), CASES)
def test_missing_packages_are_named(tool: str, package: str) -> None:
    needs = {"eval_seg": "mmseg", "train_seg": "mmseg", "train_det": "detectron2"}.get(tool)
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed at all")
    ended = run(tool, package, "--help")
    if ended.returncode == 0:  # this tool does not need it before it starts
        assert "usage" in ended.stdout and tool in ("check_identity", "benchmark")
        return
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith(tool)]
    assert package in line and INSTALL[package] in line


def test_scikit_image_is_named_where_it_is_needed(tmp_path: Path) -> None:
    ended = run("benchmark_partition", "skimage")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "benchmark_partition: skimage cannot be imported" in ended.stderr
    assert "pip install scikit-image" in ended.stderr


def test_faults_of_ours_stay_tracebacks() -> None:
    with pytest.raises(ImportError), needed_packages("tool"):
        import apt_dense.nowhere  # noqa: F401
    with pytest.raises(SystemExit, match="mmseg cannot be imported .*pip install"), needed_packages("tool"):
        raise ModuleNotFoundError("No module named 'mmseg.models'", name="mmseg.models")
