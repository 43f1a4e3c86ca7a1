"""The choice of patches inside of a model: its own, by other thresholds, or none to be found."""

from __future__ import annotations

import pytest
from torch import nn

from apt_dense import APTViT
from apt_dense.hosts.find_patch_selector import find_patch_selector


def backbone(**options: object) -> APTViT:
    return APTViT(img_size=64, patch_size=8, embed_dim=12, depth=1, num_heads=2, window_block_indexes=(0,), **options)


def test_the_models_own_choice() -> None:
    model = backbone(thresholds=(5.0,), token_budget=0.5)
    assert find_patch_selector(nn.Sequential(nn.Linear(2, 2), model)) is model.patches
    model.set_patches(token_budget=0.7)
    assert find_patch_selector(model).token_budget == 0.7


@pytest.mark.parametrize("options", [{}, {"thresholds": (5.0,), "token_budget": 0.5},
                                     {"thresholds": (5.0,), "min_tokens": 0.5}])  # fmt: skip
def test_other_thresholds(options: dict) -> None:
    found = find_patch_selector(backbone(window_size=4, **options), [4.5, 3.0])
    assert (found.thresholds, found.token_budget, found.min_tokens) == ((4.5, 3.0), None, None)
    assert (found.patch_size, found.window_size) == (8, 4)


@pytest.mark.parametrize("count", [0, 2])
def test_models_without_one_choice(count: int) -> None:
    with pytest.raises(ValueError, match=f"needs a model with one APTViT, .* but ModuleList has {count}"):
        find_patch_selector(nn.ModuleList([backbone() for _ in range(count)]))


def test_thresholds_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="thresholds="):
        find_patch_selector(backbone(window_size=2), (5.0, 4.0))
