"""Changing the patches of a model that was built."""

from __future__ import annotations

import pytest
import torch

from apt_dense import APTViT

from support.references import pictures

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"thresholds": (3.0,)},
        {"thresholds": (5.0, 3.0, 2.0)},
        {"token_budget": 0.5},
        {"thresholds": ()},
        {"scorer": "laplacian", "thresholds": (0.3,)},
    ],
)
@torch.no_grad()
def test_a_model_with_other_patches_equals_one_built_with_them(options: dict) -> None:
    model = APTViT(**TINY, thresholds=(5.0, 4.0)).eval()
    model.set_patches(**options)
    other = APTViT(**TINY, **{"thresholds": (5.0, 4.0), **options}).eval()
    other.load_state_dict(model.state_dict(), strict=bool(other.thresholds))
    assert model.patches == other.patches
    images = pictures(0, (32, 32))
    torch.testing.assert_close(model(images)[0], other(images)[0], atol=0, rtol=0)


def test_what_cannot_be_changed_is_refused_and_nothing_is_changed() -> None:
    model = APTViT(**TINY, thresholds=(5.0, 4.0))
    before = model.patches
    with pytest.raises(TypeError, match="cannot change patch_size, only thresholds"):
        model.set_patches(patch_size=8, thresholds=(1.0,))
    with pytest.raises(ValueError, match="rise with the scale"):
        model.set_patches(thresholds=(1.0, 2.0))
    with pytest.raises(ValueError, match="4 patches|at most 3 thresholds"):
        model.set_patches(thresholds=(5.0,) * 4)
    assert model.patches is before
    with pytest.raises(ValueError, match="no weights for coarse patches"):
        APTViT(**TINY).set_patches(thresholds=(5.0,))


def test_compiled_models_see_the_change() -> None:
    """With a graph for each budget, and none for thresholds alone."""
    model = APTViT(**TINY, thresholds=(5.0, 3.0), token_budget=0.6).eval()
    images, graphs = pictures(1, (32, 32)), []

    def count(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for budget, number in (1.0, 1), (0.8, 2), (0.6, 3), (0.8, 3):
        model.set_patches(token_budget=budget)
        torch.testing.assert_close(compiled(images)[0], model(images)[0])
        assert len(graphs) == number
