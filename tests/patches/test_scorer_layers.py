"""Tests of every ``FixedScorer``: copying, graphs, gradients, dtypes, devices."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

from apt_dense import APTViT, PatchSelector
from apt_dense.patches.first_block_scores import FirstBlockScorer
from apt_dense.patches.learned_scores import LearnedScorer
from apt_dense.patches.scorer_files import as_bytes
from apt_dense.patches.scorer_layers import FixedScorer

from support.contract import assert_maps_close
from support.scorers import random_scorer

TINY = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(params=[LearnedScorer, FirstBlockScorer], ids=["convolutions", "first blocks"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(as_bytes(random_scorer(request.param)))
    return str(path)


def forget_devices(scorer: FixedScorer) -> None:
    """As if the next pixels were on a device where none were before."""
    scorer._on_device.clear()
    if isinstance(scorer, FirstBlockScorer):
        scorer._blocks_on.clear()


@pytest.mark.parametrize("budget", [None, 0.6])
def test_models_choose_by_it_and_can_be_copied(file: str, budget: float | None) -> None:
    images = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(0))
    scores = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=file).scores(images)
    model = APTViT(**TINY, thresholds=(float(scores[0].median()),), scorer=file, token_budget=budget).eval()
    kept = model.patches.tokens_kept(images)
    assert kept.min() > 0.3 and kept.max() < 0.9
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not other.patches.score._on_device
            assert_maps_close(list(other(images)), list(expected), 0)
        if budget:
            forget_devices(model.patches.score)
            exported = torch.export.export(model, (images,), strict=False).module()
            forget_devices(model.patches.score)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            for graph in (compiled, exported, model):
                assert_maps_close(list(graph(images)), list(expected), 1e-5)


def test_nothing_learns_it(file: str) -> None:
    """Not a parameter, nor in the state dict; scores have no gradient."""
    model, plain = APTViT(**TINY, thresholds=(0.1,), scorer=file), APTViT(**TINY, thresholds=(5.0,))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    before = as_bytes(model.train().patches.score)
    assert not model.patches.scores(torch.randn(1, 3, 32, 32).requires_grad_())[0].requires_grad
    assert as_bytes(model.patches.score) == before


def test_16_bit_images_are_scored_in_float32(file: str) -> None:
    """But for the blocks of a ViT, under autocast only."""
    selector = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=file)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = selector.scores(images.float())[0]
    torch.testing.assert_close(selector.scores(images)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = selector.scores(images)
    assert found.dtype == torch.float32
    follows = isinstance(selector.score, FirstBlockScorer)
    assert torch.equal(found, expected) != follows
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_it_is_read_whatever_type_and_device_new_tensors_get(file: str) -> None:
    images = torch.randn(1, 3, 32, 32)
    expected = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=file).scores(images)[0]
    Path(file).touch()  # read again
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            selector = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=file)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(selector.scores(images)[0], expected)


def test_nothing_is_drawn_from_the_generator(file: str) -> None:
    torch.manual_seed(0)
    PatchSelector(thresholds=(0.1,), scorer=file)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [None, 0.6])
def test_it_follows_the_images_to_a_gpu(file: str, budget: float | None) -> None:
    model = APTViT(**TINY, thresholds=(0.1,), scorer=file, token_budget=budget).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model.patches.scores(images)[0]
    torch.testing.assert_close(model.cuda().patches.scores(images.cuda())[0].cpu(), expected, atol=1e-3, rtol=1e-2)
    if budget:
        forget_devices(model.patches.score)
        with torch.no_grad():
            torch.compile(model, fullgraph=True, mode="reduce-overhead")(images.cuda())
