"""Images and scores that are none: an error that names what came and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT, PatchSelector

from support.references import noise

GOOD = noise(2, 3, 32, 32)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "images are NoneType; expected one tensor"),
    "a list": (lambda: list(GOOD), "images are list; expected one tensor.*torch.stack"),
    "a tuple": (lambda: (GOOD,), "images are tuple; expected one tensor"),
    "an array": (GOOD.numpy, "images are numpy.ndarray; expected one tensor"),
    "a number": (lambda: 3, "images are int; expected one tensor"),
    "a dictionary": (lambda: {"image": GOOD}, "images are dict; expected one tensor"),
    "a name": (lambda: "photo.jpg", "images are str; expected one tensor"),
    "grey levels": (lambda: (GOOD * 50).byte(), "images are torch.uint8; expected normalised floating point"),
    "truth values": (lambda: GOOD > 0, "images are torch.bool; expected normalised floating point"),
    "whole numbers": (lambda: GOOD.long(), "images are torch.int64; expected normalised floating point"),
    "complex numbers": (lambda: GOOD.to(torch.complex64), "images are torch.complex64; expected normalised"),
    "meta": (lambda: GOOD.to("meta"), "on the device 'meta', which holds no pixels"),
    "sparse": (lambda: GOOD.to_sparse(), "layout torch.sparse_coo; expected a dense one"),
    "nested": (lambda: torch.nested.nested_tensor([GOOD[0], GOOD[1, :, :8]]), "expected a dense one"),
    "one image": (lambda: GOOD[0], r"images have shape \(3, 32, 32\); expected \(B, 3, H, W\)"),
    "channels last": (lambda: GOOD.movedim(1, 3), r"images have shape \(2, 32, 32, 3\); expected"),
    "none at all": (lambda: GOOD[:0], r"shape \(0, 3, 32, 32\); expected at least one image"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"thresholds": (5.0,)}, {"thresholds": (5.0,), "token_budget": 0.6}], ids=str)
@pytest.mark.parametrize("kind", BAD)
def test_images_that_are_none(kind: str, options: dict[str, Any]) -> None:
    make, message = BAD[kind]
    model = APTViT(img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=2, **options)
    for take in (model, model.partition, model.patches.count, model.patches.tokens_kept):
        with pytest.raises((TypeError, ValueError), match=message):
            take(make())


@pytest.mark.filterwarnings("ignore")
def test_a_model_on_meta_says_so() -> None:
    model = APTViT(img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=2).to("meta")
    with pytest.raises(ValueError, match="to_empty"):
        model(GOOD.to("meta"))


MAP = torch.ones(2, 4, 4)
MAPS: dict[str, tuple[Any, str]] = {
    "None": (None, "the scorer returned a NoneType; expected one tensor"),
    "a tensor": (MAP, "the scorer returned a Tensor; expected one tensor of real numbers for each scale, in a tuple"),
    "an array": (MAP.numpy(), "the scorer returned a ndarray"),
    "arrays": ([MAP.numpy()], "a map that is a ndarray"),
    "lists": ([MAP.tolist()], "a map that is a list"),
    "a number": (5.0, "the scorer returned a float"),
    "numbers": ([5.0], "a map that is a float"),
    "nothing in a list": ([None], "a map that is a NoneType"),
    "a dictionary": ({1: MAP}, "the scorer returned a dict"),
    "complex numbers": ([MAP * 1j], "a map that is a tensor of torch.complex64"),
    "truth values": ([MAP > 0], "a map that is a tensor of torch.bool"),
    "meta": ([MAP.to("meta")], "a map on meta; expected it on cpu"),
    "too many": ([MAP, MAP], "expected"),
    "too few": ([], "expected"),
    "another shape": ([MAP[:, :2]], r"maps of \[\(2, 2, 4\)\]; expected \[\(2, 4, 4\)\]"),
    "one image's": ([MAP[0]], "expected"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [None, 0.6])
@pytest.mark.parametrize("kind", MAPS)
def test_scores_that_are_none(kind: str, budget: float | None) -> None:
    maps, message = MAPS[kind]
    options = {"patch_size": 4, "thresholds": (5.0,), "token_budget": budget}
    with pytest.raises((TypeError, ValueError), match=message):
        PatchSelector(**options, scorer=lambda pixels, patch_size, scales: maps).scale_map(GOOD)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_scores_of_any_real_type_count(dtype: Any) -> None:
    def score(pixels: Tensor, patch_size: int, scales: Any) -> list[Tensor]:
        return [torch.arange(32).view(2, 4, 4).to(dtype)]

    scales = PatchSelector(patch_size=4, thresholds=(5.0,), scorer=score).scale_map(GOOD)
    assert (scales[:, ::2, ::2].flatten() == 1).sum() == 5


@pytest.mark.parametrize("options", [{}, {"thresholds": (5.0,)}, {"thresholds": (5.0,), "token_budget": 0.6}], ids=str)
def test_images_under_vmap(options: dict[str, Any]) -> None:
    model = APTViT(img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=2, **options)

    def loss(image: Tensor) -> Tensor:
        return model(image[None])[0].sum()

    for transformed in (loss, torch.func.grad(loss), torch.func.vjp, model.partition):
        function = transformed if transformed is not torch.func.vjp else lambda image: torch.func.vjp(loss, image)[0]
        with pytest.raises(TypeError, match=r"torch.vmap over images is not supported.*pass a batch"):
            torch.vmap(function)(GOOD if transformed is not model.partition else GOOD[:, None])
