"""Files of learned scorers: what is read back, and what is refused."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from apt_dense import PatchSelector
from apt_dense.patches.first_block_scores import FirstBlockScorer
from apt_dense.patches.learned_scores import LearnedScorer
from apt_dense.patches.scorer_files import as_bytes, load_scorer
from apt_dense.patches.scorer_layers import FixedScorer

from support.scorers import MODEL, PADDING, random_scorer

KINDS = pytest.mark.parametrize("kind", [LearnedScorer, FirstBlockScorer])


@KINDS
def test_a_file_holds_the_scorer(tmp_path: Path, kind: type[FixedScorer]) -> None:
    (tmp_path / "scorer.safetensors").write_bytes(as_bytes(random_scorer(kind)))
    found, expected = load_scorer(tmp_path / "scorer.safetensors", PADDING), random_scorer(kind)
    pixels = torch.randint(0, 256, (2, 3, 64, 50), generator=torch.Generator().manual_seed(0)).float()
    for one, other in zip(found(pixels, 8, [1, 2]), expected(pixels, 8, [1, 2]), strict=True):
        torch.testing.assert_close(one, other)
        assert one.std() > 1e-4
    assert as_bytes(found) == as_bytes(expected) and type(found) is type(expected)


@KINDS
def test_a_file_is_read_again_when_it_changes(tmp_path: Path, kind: type[FixedScorer]) -> None:
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(as_bytes(random_scorer(kind)))
    first = load_scorer(path, PADDING)
    assert load_scorer(path, PADDING) is first
    path.write_bytes(as_bytes(random_scorer(kind, seed=1)))
    os.utime(path, ns=(1, 1))
    assert as_bytes(load_scorer(path, PADDING)) == as_bytes(random_scorer(kind, seed=1)) != as_bytes(first)


TEST_VIT = json.dumps({"first_block_scorer": 1, "model": MODEL})


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("code of a file was run",))


def note(text: str) -> bytes:
    return save({"vit.blocks.0.norm1.weight": torch.zeros(1)}, {"apt_dense": text})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b"\xff" * 100, "is damaged"),
        (pickle.dumps(_Bomb()), "is damaged"),
        (note("{"), "is damaged"),
        (save({"a": torch.zeros(1)}), "is no learned scorer"),
        (note("[1]"), "is no learned scorer"),
        (note('{"learned_scorer": 2}'), "is no learned scorer"),
        (note("[" * 100_000), "is damaged"),
        (note('{"first_block_scorer": 1}'), "is of the model None"),
        (save({"a": torch.zeros(1)}, {"apt_dense": TEST_VIT}), "first 0 blocks"),
        (note('{"first_block_scorer": 1, "model": "hf-hub:some/vit"}'), "timm has no model 'hf-hub"),
        (note('{"first_block_scorer": 1, "model": "local-dir:/tmp"}'), "timm has no model 'local-dir"),
        (note('{"first_block_scorer": 1, "model": "resnet18"}'), "resnet18 is no plain ViT"),
        (note(TEST_VIT), "holds nothing as vit.cls_token"),
    ],
    ids=[
        "empty", "noise", "pickle", "no note", "weights", "a list", "newer", "deep note", "nameless", "no blocks",
        "download", "folder", "no ViT", "weights of others",
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"scorer=.*{words}"):
        PatchSelector(thresholds=(0.1,), scorer=str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file; tools/fit_scorer.py"):
        PatchSelector(thresholds=(0.1,), scorer=str(path))


@pytest.mark.parametrize("name", ["vit.blocks.1.attn.qkv.weight", "head.0.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_weights_that_are_not_finite_float32_are_named(tmp_path: Path, name: str, value: float | torch.dtype) -> None:
    content = load(as_bytes(random_scorer(FirstBlockScorer)))
    if isinstance(value, torch.dtype):
        content[name] = content[name].to(value)
    else:
        content[name].view(-1)[0] = value
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(save(content, {"apt_dense": TEST_VIT}))
    with pytest.raises(ValueError, match=f"scorer=.*as {name}; expected finite float32"):
        load_scorer(path, PADDING)


def test_weights_beyond_those_needed_are_left_out(tmp_path: Path) -> None:
    content = load(as_bytes(random_scorer(FirstBlockScorer)))
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(save({**content, "vit.norm.weight": torch.ones(64)}, {"apt_dense": TEST_VIT}))
    assert load_scorer(path, PADDING).weights.keys() == content.keys()
