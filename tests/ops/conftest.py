"""Kernels are tested as AMD's Zen 5 chooses them, whatever the machine, but with slices that compute in float32. Other
choices have tests of their own."""

from __future__ import annotations

import pytest
import torch

from apt_dense import runtime


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "processor_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(runtime, "processor_family", lambda: 26)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
