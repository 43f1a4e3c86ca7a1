"""One thread, for tests of tiny models."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: tiny models lose more by waiting for threads than they gain, and on one thread sums
    come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
