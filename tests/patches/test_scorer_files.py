"""Files of learned scorers: what is read back, and what is refused."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from apt_dense import PatchSelector
from apt_dense.patches.first_block_scores import FirstBlockScorer, first_blocks, head_shapes
from apt_dense.patches.learned_scores import LAYERS, LearnedScorer
from apt_dense.patches.scorer_files import FileScorer, as_bytes, load_scorer

from support.scorers import MODEL, random_head, random_vit_weights

PADDING = (124.0, 116.0, 104.0)


def scorer_of(kind: str, seed: int = 0) -> FileScorer:
    if kind == "convolutions":
        return LearnedScorer(random_head(LAYERS, seed), PADDING)
    vit = first_blocks(MODEL, 2, random_vit_weights(seed))
    return FirstBlockScorer(MODEL, vit, random_head(head_shapes(vit), seed))


KINDS = pytest.mark.parametrize("kind", ["convolutions", "first blocks"])


@KINDS
def test_a_file_holds_the_scorer(tmp_path: Path, kind: str) -> None:
    (tmp_path / "scorer.safetensors").write_bytes(as_bytes(scorer_of(kind)))
    found, expected = load_scorer(tmp_path / "scorer.safetensors", PADDING), scorer_of(kind)
    pixels = torch.randint(0, 256, (2, 3, 64, 50), generator=torch.Generator().manual_seed(0)).float()
    for one, other in zip(found(pixels, 8, [1, 2]), expected(pixels, 8, [1, 2]), strict=True):
        torch.testing.assert_close(one, other)
        assert one.std() > 1e-4
    assert as_bytes(found) == as_bytes(expected) and type(found) is type(expected)


@KINDS
def test_a_file_is_read_again_when_it_changes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(as_bytes(scorer_of(kind)))
    first = load_scorer(path, PADDING)
    assert load_scorer(path, PADDING) is first
    path.write_bytes(as_bytes(scorer_of(kind, seed=1)))
    os.utime(path, ns=(1, 1))
    assert as_bytes(load_scorer(path, PADDING)) == as_bytes(scorer_of(kind, seed=1)) != as_bytes(first)


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
        (note('{"first_block_scorer": 1}'), "1 blocks of the model None"),
        (save({"a": torch.zeros(1)}, {"apt_dense": '{"first_block_scorer": 1, "model": "test_vit"}'}), "0 blocks"),
        (note('{"first_block_scorer": 1, "model": "hf-hub:some/vit"}'), "timm has no model 'hf-hub"),
        (note('{"first_block_scorer": 1, "model": "local-dir:/tmp"}'), "timm has no model 'local-dir"),
        (note('{"first_block_scorer": 1, "model": "resnet18"}'), "resnet18 is no ViT"),
        (note('{"first_block_scorer": 1, "model": "test_vit"}'), "weights are not those of test_vit"),
    ],
    ids=[
        "empty", "noise", "pickle", "no note", "weights", "a list", "newer", "nameless", "no blocks", "download",
        "folder", "no ViT", "weights of others",
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


@pytest.mark.parametrize(
    ("name", "words"), [("vit.blocks.1.attn.qkv.weight", "NaN or infinity as blocks.1"), ("head.0.bias", "head.0.bias")]
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, words: str) -> None:
    content = load(as_bytes(scorer_of("first blocks")))
    content[name].view(-1)[0] = torch.nan
    path = tmp_path / "scorer.safetensors"
    kind = {"first_block_scorer": 1, "model": MODEL}
    path.write_bytes(save(content, {"apt_dense": json.dumps(kind)}))
    with pytest.raises(ValueError, match=f"scorer=.*{words}"):
        load_scorer(path, PADDING)
