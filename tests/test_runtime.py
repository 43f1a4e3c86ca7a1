"""Questions about the machine: the same answers wherever operations run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import runtime


@given(st.lists(st.integers(0, 11), max_size=40))
def test_bins_are_counted_alike_on_the_host_and_elsewhere(numbers: list[int]) -> None:
    slots = torch.tensor(numbers, dtype=torch.int64)
    expected = [numbers.count(number) for number in range(12)]
    assert runtime.bin_counts(slots, 12).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "runs_on_host", lambda tensor: False)
        assert runtime.bin_counts(slots, 12).tolist() == expected


def test_a_requirement_raises_where_the_host_may_look() -> None:
    runtime.require(torch.tensor(True), "never")
    with pytest.raises(ValueError, match="two and two"):
        runtime.require(torch.tensor(False), "two and two")


def test_a_requirement_becomes_an_assertion_in_compiled_code() -> None:
    def double(x: Tensor) -> Tensor:
        runtime.require((x > 0).all(), "expected positive numbers")
        return 2 * x

    torch._dynamo.reset()
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="expected positive numbers"):
        compiled(-torch.ones(3))


def test_functions_stay_outside_compiled_graphs() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    assert runtime.outside_graphs(look) is look
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: runtime.outside_graphs(look)(2 * x), backend="eager")
    assert compiled(torch.ones(2)).tolist() == [3, 3] and seen == [False]


def test_copies_to_a_device_keep_types_and_gaps() -> None:
    tensors = [torch.arange(4).view(2, 2), None, torch.tensor([True, False]), torch.zeros(0, dtype=torch.int64)]
    assert runtime.to_device(tensors, torch.device("cpu")) == tensors
    moved = runtime.to_device(tensors, torch.device("meta"))
    assert moved[1] is None
    for own, other in zip(moved, tensors, strict=True):
        assert other is None or (own.is_meta and own.shape == other.shape and own.dtype == other.dtype)


def test_products_without_autocast_keep_their_type() -> None:
    x = torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with runtime.without_autocast(x):
            assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("found", [True, False])
def test_the_matrix_unit_is_that_of_the_type(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: found, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: False, raising=False)
    kinds = torch.bfloat16, torch.float16, torch.float32
    assert [runtime.has_matrix_unit(kind) for kind in kinds] == [found, False, False]


@pytest.mark.parametrize(
    ("text", "vendor", "family"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n", "GenuineIntel", 6),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t: 2\n", "AuthenticAMD", 26),
        ("CPU implementer : 0x41\n", "", 0),
    ],
)
def test_the_maker_and_family_of_the_processor(
    text: str, vendor: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.Path, "exists", lambda path: True)
    monkeypatch.setattr(runtime.Path, "read_text", lambda path: text)
    monkeypatch.setattr(runtime.platform, "processor", lambda: "aarch64")
    assert runtime.processor_vendor.__wrapped__() == vendor
    assert runtime.processor_family.__wrapped__() == family
