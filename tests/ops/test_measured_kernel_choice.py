"""The choice between kernels by measured times: which is taken, and that mistakes lead back to PyTorch's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_dense import APTViT, runtime
from apt_dense.ops import measured_kernel_choice as measured_choice
from apt_dense.ops import onednn_matmul
from apt_dense.ops.attention import case_of, choose
from apt_dense.ops.bias import RelativeBias
from apt_dense.ops.kernels.interface import Inputs
from apt_dense.ops.measured_kernel_choice import (
    LENGTHS,
    Case,
    Seconds,
    fastest,
    format_times,
    nearest_length,
    parse_times,
    times_of_machine,
    timings_path,
)

from support.references import layout_of, noise

FAST, SLOW, UNSURE = Seconds(0.9, 1.0, 1.1), Seconds(1.9, 2.0, 2.1), Seconds(0.9, 1.0, 3.0)
CASE = Case("attention", "float32", 64, "", False)
Install = Callable[[dict[str, dict[str, Seconds]]], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that makes times those of this machine; on a processor that no facts are known of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "processor_vendor", lambda: "")

    def write(times: dict[str, dict[str, Seconds]]) -> Path:
        threads = torch.get_num_threads()
        path = timings_path(threads)
        path.parent.mkdir(exist_ok=True)
        path.write_text(format_times(times, threads))
        times_of_machine.cache_clear()
        return path

    times_of_machine.cache_clear()
    yield write
    times_of_machine.cache_clear()


def inputs_of(dtype: torch.dtype = torch.float32, relative: bool = False, trains: bool = False) -> Inputs:
    q, k, v = (noise(6, 2, 4).to(dtype).requires_grad_(trains) for _ in range(3))
    layout = layout_of(6)
    return Inputs(q, k, v, layout.images, RelativeBias(noise(6, 2, 7), layout.image_cells) if relative else None)


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"rows": FAST, "sdpa": SLOW, "mask": SLOW}, "rows"),
        ({"rows": SLOW, "sdpa": FAST, "mask": SLOW}, "sdpa"),
        ({"rows": SLOW, "sdpa": SLOW, "mask": FAST}, "mask"),
        ({"rows": UNSURE, "sdpa": SLOW}, "sdpa"),  # fast at the median, but its slow rounds were slower
        ({"rows": FAST, "sdpa": FAST}, "sdpa"),
        ({"sdpa": SLOW}, "sdpa"),
        ({"rows": FAST, "mask": FAST}, None),  # nothing to compare with
        ({}, None),
    ],
)
def test_a_kernel_must_be_clearly_faster(times: dict[str, Seconds], taken: str | None, install: Install) -> None:
    install({CASE.key: times})
    assert fastest(CASE, "sdpa", ("rows", "sdpa", "mask")) == taken


def test_only_kernels_that_can_run_are_taken(install: Install) -> None:
    install({CASE.key: {"rows": FAST, "sdpa": SLOW}})
    assert fastest(CASE, "sdpa", ("sdpa", "mask")) == "sdpa"


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"relative": True}, {"trains": True}], ids=lambda o: str(o) or "plain"
)
def test_auto_takes_what_was_measured_for_its_case_alone(options: dict, install: Install) -> None:
    install({case_of(inputs_of(**options)).key: {"mask": FAST, "sdpa": SLOW}})
    assert choose(inputs_of(**options)) == "mask"
    for other in ({}, {"dtype": torch.bfloat16}, {"relative": True}, {"trains": True}):
        if other != options:
            assert choose(inputs_of(**other)) == "sdpa"


def test_a_name_is_taken_whatever_was_measured(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install({case_of(inputs_of()).key: {"mask": FAST, "sdpa": SLOW}})
    model = APTViT(
        img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, thresholds=(), attention_backend="rows"
    )
    from apt_dense.ops.kernels import cpu_sliced

    ran = []
    apply = cpu_sliced._Rows.apply
    monkeypatch.setattr(cpu_sliced._Rows, "apply", lambda *operands: ran.append(1) or apply(*operands))
    model(noise(1, 3, 16, 16))
    assert ran


@pytest.mark.parametrize(
    ("inference", "training"), [("onednn", "onednn"), ("onednn", "pytorch"), ("pytorch", "onednn"), (None, None)]
)
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_products(
    inference: str | None, training: str | None, vendor: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "processor_vendor", lambda: vendor)
    times = {
        Case("linear", "float32", 0, "", trains).key: {
            name: FAST if name == best else SLOW for name in onednn_matmul.PRODUCTS
        }
        for trains, best in ((False, inference), (True, training))
        if best
    }
    install(times)
    for trains, best in ((False, inference), (True, training)):
        known = vendor == "AuthenticAMD" if best is None else best == "onednn"
        assert onednn_matmul.is_faster(trains) == known


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"seconds": {"a": {"sdpa": [1, 2]}}}', "TypeError"),
        ('{"seconds": {"a": {"sdpa": [1, "x", 2]}}}', "ValueError"),
        ('{"seconds": {"a": {"sdpa": [3, 2, 1]}}}', "quartiles"),
        ('{"seconds": {"a": {"sdpa": [0, 0, 0]}}}', "quartiles"),
        ('{"seconds": {"a": {"sdpa": [1, NaN, 2]}}}', "quartiles"),
        ('{"seconds": {"a": {"sdpa": [1, 2, Infinity]}}}', "quartiles"),
    ],
)
def test_damaged_files_are_named_and_not_used(
    text: str, said: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    path = install({})
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        parse_times(text)
    with caplog.at_level(logging.WARNING):
        assert choose(inputs_of()) == "sdpa"
    assert str(path) in caplog.text and "measure again" in caplog.text


def test_files_differ_by_threads_processor_and_version(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [timings_path(1), timings_path(2)]
    monkeypatch.setattr(measured_choice, "describe_machine", lambda: "another processor")
    paths.append(timings_path(1))
    monkeypatch.setattr(torch, "__version__", "99.0")
    paths.append(timings_path(1))
    assert len(set(paths)) == 4


@given(
    st.dictionaries(
        st.sampled_from([CASE.key, "other"]),
        st.dictionaries(st.sampled_from(["rows", "sdpa"]), st.floats(1e-9, 1e3).map(lambda s: Seconds(s, s, s))),
    )
)
def test_files_hold_what_was_written(times: dict[str, dict[str, Seconds]]) -> None:
    text = format_times(times, 2)
    assert parse_times(text) == times and json.loads(text)["threads"] == 2


@given(st.floats(0, 1e6))
def test_lengths_go_to_the_nearest(length: float) -> None:
    nearest = nearest_length(length)
    ratios = {candidate: max(candidate / max(length, 1), max(length, 1) / candidate) for candidate in LENGTHS}
    assert ratios[nearest] == pytest.approx(min(ratios.values()))
