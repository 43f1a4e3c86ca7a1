"""Settings and images that all tests share."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# No deadlines and no random seeds: the suite answers the same on a slow machine and tomorrow.
settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=40, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("suite")


#: Files that start whole programs, in their order. They go first, so that no worker ends with one of them while the
#: others wait (together with xdist's --dist loadfile --no-loadscope-reorder). Those whose trainings are forked come
#: before all that compile: after some graphs PyTorch's autograd refuses to run in a fork.
LONG = (
    "test_interruptions_at_every_write.py", "test_interruptions.py", "test_patch_schedules.py",
    "test_two_processes_equal_one.py", "test_balanced_trainings.py", "test_gradients_of_two_processes.py",
    "test_benchmark_ranks.py", "test_dry_run.py", "test_readme.py", "test_packages.py", "test_graphs.py",
    "test_doors.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and skip the tests marked ``cuda`` where there is no GPU."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by waiting for threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _detectron2_hands_its_log_on() -> None:
    """A run of Detectron2 keeps its logger's entries to itself from then on, out of sight of ``caplog``."""
    logging.getLogger("detectron2").propagate = True


@pytest.fixture(scope="session", autouse=True)
def _short_waits_for_data_workers() -> Iterator[None]:
    """A DataLoader that ends early waits so long for each of its workers, by default five seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_tuned_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a developer measured on their machine (tools/tune_kernels.py) decides nothing in the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _unformatted_configs() -> Iterator[None]:
    """MMEngine formats the whole config as Python code for every checkpoint, which takes longer than tiny trainings."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("yapf") and importlib.util.find_spec("mmengine"):
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test draws the same numbers whatever ran before, and leaves the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def photos() -> dict[str, Tensor]:
    """8-bit photographs (3, H, W) in RGB that ship with scikit-image; no size is a multiple of 32."""
    data = pytest.importorskip("skimage.data")
    crops = {"astronaut": (200, 330), "coffee": (330, 200), "chelsea": (300, 451), "rocket": (427, 201)}
    return {
        name: torch.from_numpy(np.array(getattr(data, name)()))[:rows, :columns].permute(2, 0, 1).contiguous()
        for name, (rows, columns) in crops.items()
    }
