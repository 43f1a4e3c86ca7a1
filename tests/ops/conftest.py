"""Kernels are tested as AMD's Zen 5 chooses them, whatever the machine; other choices have tests of their own."""

from __future__ import annotations

import pytest

from apt_dense import runtime


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "processor_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(runtime, "processor_family", lambda: 26)
