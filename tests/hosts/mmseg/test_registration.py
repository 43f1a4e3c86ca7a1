"""One import registers everything that configs can name; without MMSeg, everything that only needs MMEngine."""

from __future__ import annotations

import pytest

from support.fresh_python import run_fresh

pytest.importorskip("mmengine", reason="the MMSeg host needs the packages of the extra 'mmseg'")

#: Prints what is registered under our names, and whether "apt_atomic" is there.
PRINT = """
import apt_dense.hosts.mmseg
from mmengine import registry
from mmengine.fileio import get_file_backend
names = "MODELS", "OPTIM_WRAPPERS", "OPTIM_WRAPPER_CONSTRUCTORS", "TRANSFORMS", "DATASETS"
for name in names:
    known = getattr(registry, name).module_dict
    print(name, *sorted(k for k, v in known.items() if v.__module__.startswith("apt_dense")))
print(type(get_file_backend(backend_args=dict(backend="apt_atomic"))).__name__)
"""
WITHOUT_MMSEG = [
    "MODELS APTViT",
    "OPTIM_WRAPPERS CPUAmpOptimWrapper",
    "OPTIM_WRAPPER_CONSTRUCTORS APTLearningRateDecayOptimWrapperConstructor",
    "TRANSFORMS",
    "DATASETS SeededDataset",
    "AtomicLocalBackend",
]


def registered(code: str) -> list[str]:
    lines = run_fresh(code).stdout.splitlines()
    return [line.strip() for line in lines if not line.startswith("Could not import")]


def test_the_import_of_configs_registers_everything() -> None:
    pytest.importorskip("mmseg")
    models = "MODELS APTEncoderDecoder APTSegTTAModel APTUPerHead APTViT"
    data = "TRANSFORMS APTLoadAnnotations APTLoadImage APTLoadLabels CheckLabels", "DATASETS APTFolders SeededDataset"
    assert registered(PRINT) == [models, *WITHOUT_MMSEG[1:3], *data, WITHOUT_MMSEG[5]]


def test_without_mmseg_it_registers_what_needs_mmengine_only() -> None:
    missing = "import sys\nsys.modules['mmseg'] = sys.modules['mmcv'] = None\n"
    assert registered(missing + PRINT) == WITHOUT_MMSEG
