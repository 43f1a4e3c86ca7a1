"""Weights that are none: named and refused at every door."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from apt_dense import APTViT
from apt_dense.weights.convert import to_apt
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import load_backbone
from apt_dense.weights.tensor_checks import check_kinds

NAME = "blocks.0.attn.qkv.weight"
ODD = {
    "int8": lambda w: w.to(torch.int8), "uint8": lambda w: w.to(torch.uint8), "int64": lambda w: w.long(),
    "bool": lambda w: w > 0, "complex": lambda w: w.to(torch.complex64), "sparse": lambda w: w.to_sparse(),
    "csr": lambda w: w.to_sparse_csr(), "meta": lambda w: w.to("meta"),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "float": lambda w: 0.5, "int": lambda w: 3,
    **{f"float8 {kind}": lambda w, kind=kind: w.to(getattr(torch, f"float8_{kind}")) for kind in ("e4m3fn", "e5m2")},
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[1, :3]]),
    "jagged": lambda w: torch.nested.nested_tensor([w[0], w[1, :3]], layout=torch.jagged),
    "uninitialised": lambda w: torch.nn.UninitializedParameter(), "fake": lambda w: fake(w),
    "list": lambda w: w.tolist(), "None": lambda w: None, "text": lambda w: "x",
    "storage": lambda w: w.untyped_storage(),
    "whole array": lambda w: w.long().numpy(), "array of objects": lambda w: np.array([w, None], object),
}  # fmt: skip


def fake(w: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.ones(w.shape)


def small() -> APTViT:
    return APTViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)


def odd(kind: str) -> dict[str, Any]:
    state = dict(small().state_dict())
    return {**state, NAME: ODD[kind](state[NAME])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", ["", "model", "prefix"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_weights_are_named(kind: str, wrapped: str) -> None:
    state: dict = odd(kind)
    if wrapped == "model":
        state = {"model": state}
    if wrapped == "prefix":
        state = {f"module.backbone.{name}": value for name, value in state.items()}
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{NAME} is"):
        load_backbone(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("uninitialised", "nested")])
def test_load_state_dict_refuses_them_too(kind: str) -> None:
    """Those left out are refused by torch itself, before it asks us."""
    with pytest.raises(RuntimeError, match=rf"{NAME} is"):
        small().load_state_dict(odd(kind))


@pytest.mark.parametrize("key", [0, 1.5, None, ("a", "b"), b"pos_embed"])
def test_keys_that_are_not_text_are_named(key: Any) -> None:
    state = {**small().state_dict(), key: torch.zeros(2)}
    for load in (lambda: load_backbone(small(), state), lambda: to_apt(state), lambda: check_kinds(state, {})):
        with pytest.raises(ValueError, match="has the key .*weights have names"):
            load()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight is \(.*\) in the checkpoint"):
        load_backbone(small(), {**small().state_dict(), NAME: torch.zeros(shape)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_real_numbers_of_any_precision_are_weights(dtype: torch.dtype) -> None:
    assert not load_backbone(small(), {k: v.to(dtype) for k, v in small().state_dict().items()}).missing


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (1e200, "beyond")])
@pytest.mark.parametrize("name", [NAME, "pos_embed", "patch_embed.proj.bias"])
def test_numbers_that_are_not_finite_are_warned_of(name: str, value: float, message: str) -> None:
    state = {key: weight.double() for key, weight in small().state_dict().items()}
    state[name].view(-1)[0] = value
    with pytest.warns(UserWarning, match=f"{name} holds .*{message}"):
        load_backbone(small(), state)


def test_large_finite_numbers_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(small(), {**small().state_dict(), NAME: torch.full((48, 16), 3e38)})


@pytest.mark.parametrize("kind", ["f2", "<f4", ">f4", "f8"])
def test_arrays_of_real_numbers_are_weights(kind: str, tmp_path: Path) -> None:
    model, source = small(), small()
    arrays = {name: value.numpy().astype(kind) for name, value in source.state_dict().items()}
    for content in (arrays, {"model": arrays}, {f"module.backbone.{name}": a for name, a in arrays.items()}):
        torch.save(content, tmp_path / "a.pth")
        assert len(load_backbone(model, tmp_path / "a.pth").loaded) == len(arrays)
        torch.testing.assert_close(model.pos_embed, source.pos_embed, atol=1e-4, rtol=1e-3)


def test_whole_numbers_are_fine_where_the_model_has_them() -> None:
    own = torch.nn.BatchNorm1d(2).state_dict()
    check_kinds(own, own)
    with pytest.raises(ValueError, match="running_mean is of torch.int8"):
        check_kinds({**own, "running_mean": torch.zeros(2, dtype=torch.int8)}, own)
    check_kinds({"head.weight": torch.zeros(2, dtype=torch.int8)})


def test_a_distilled_deit_s_token_is_named_with_advice() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)
    shape = dict(img_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3)
    state = dict(theirs.state_dict())
    for content in (state, {"model": state}):
        with pytest.raises(ValueError, match="distilled DeiT: its dist_token.* reg_tokens=1"):
            load_backbone(APTViT(**shape, class_token=True), content)
    state["reg_token"] = state.pop("dist_token")
    ours = APTViT(**shape, class_token=True, reg_tokens=1, final_norm=True).eval()
    load_backbone(ours, state)  # as advised, with the same values
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval().forward_features(images)[:, 2:].mT.unflatten(2, (2, 2))
        assert torch.allclose(ours(images)[0], expected, atol=1e-4)


class Claim:
    """A tensor of more numbers than its storage holds."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.size, self.stride = size, stride

    def __reduce__(self) -> tuple:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(2).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, {})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size, stride", [
    ((10**12,), (1,)), ((10**9,), (1,)), ((10**6,), (1,)), ((10**12,), (0,)),
    ((2, 10**9), (1, 0)), ((3, 10**5), (10**5, 1)),
])  # fmt: skip
def test_tensors_larger_than_their_storage_are_refused(
    size: tuple[int, ...], stride: tuple[int, ...], zipped: bool, tmp_path: Path
) -> None:
    content = {"model": {"a": Claim(size, stride)}, "list": [Claim(size, stride)]}
    for part in ({"model": content["model"]}, {"list": content["list"]}):
        torch.save(part, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("claimed", [10**12, 10**6, 100])
def test_safetensors_that_claim_more_are_refused(claimed: int, tmp_path: Path) -> None:
    header = f'{{"a":{{"dtype":"F32","shape":[{claimed}],"data_offsets":[0,{4 * claimed}]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_checkpoint(tmp_path / "a.safetensors")


def values_of(path: Path) -> Tensor:
    return read_checkpoint(path)["a"]


@pytest.mark.parametrize("claimed", [3, 1000])
def test_a_record_shorter_than_its_storage_is_not_read_beyond(claimed: int, tmp_path: Path) -> None:
    """The pickle of a zip says how many numbers a storage has; the record holds fewer."""
    torch.save({"a": torch.arange(claimed, dtype=torch.float32)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "a.pth", "w") as short:
        for entry in whole.namelist():
            data = whole.read(entry)
            short.writestr(entry, data[:4] if entry.endswith("data/0") else data)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        values_of(tmp_path / "a.pth")
