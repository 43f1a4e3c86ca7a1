"""The contract that every family of ViTs and every host's backbone keeps, as one class of tests.

A subclass names its cases in ``cases`` and says in ``make`` what each is. pytest runs every test for every case.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from apt_dense import APTViT

from support.references import noise, normalise

THRESHOLDS = (5.0, 5.0)  # between flat images and noise, whatever the patch size
BUDGET = 0.6


class Case(NamedTuple):
    """A backbone under test.

    Args:
        build: options -> the backbone with random weights that do not depend on the options, in eval mode.
        original: the feature maps of the implementation that it replaces, with the same weights.
        patch_size: pixels; images of whole patches must give the values of the original.
        crops: whether sizes are rounded down to whole patches.
        takes_partial: whether the original takes sizes that the patch size does not divide.
        least: patches along a side that images must have.
        backbone_of: the ``APTViT`` inside what ``build`` gives.
    """

    build: Callable[..., nn.Module]
    original: Callable[[Tensor], Mapping[str, Tensor] | tuple[Tensor, ...]]
    patch_size: int
    crops: bool = False
    takes_partial: bool = True
    least: int = 1
    backbone_of: Callable[[nn.Module], APTViT] = lambda model: model


def maps_of(outputs: Mapping[str, Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def photos(rows: int, columns: int, seed: int = 0) -> Tensor:
    """An image that is flat on the left half, one of noise, one that is flat, normalised."""
    pixels = torch.randint(0, 256, (3, 3, rows, columns), generator=torch.Generator().manual_seed(seed))
    pixels[0, ..., : columns // 2] = 90
    pixels[2] = 40
    return normalise(pixels)


def assert_maps_close(found: list[Tensor], expected: list[Tensor], atol: float, rtol: float = 0) -> None:
    assert len(found) == len(expected) > 0
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=atol, rtol=rtol)


class Blocks(nn.Module):
    """The blocks of a backbone with a budget, on the rows of images whose layout is given."""

    def __init__(self, backbone: APTViT, images: Tensor) -> None:
        super().__init__()
        self.embed = lambda images: backbone._tokens(images)[0]
        _, self.layout, self.rotary = backbone._tokens(images)
        self.blocks = backbone.blocks

    def forward(self, rows: Tensor) -> Tensor:
        for block in self.blocks:
            rows = block(rows, self.layout, self.rotary)
        return rows


class BackboneContract:
    cases: ClassVar[list[str]]
    traced: ClassVar[list[str] | None] = None  # cases whose model is compiled and exported as a whole; None for all
    tolerance: ClassVar[float] = 1e-4

    def make(self, name: str) -> Case:
        """The case of that name."""
        raise NotImplementedError

    @pytest.fixture
    def case(self, name: str) -> Case:
        return self.make(name)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test of the class for all cases; pytest calls this by its name."""
        metafunc.parametrize("name", self.cases)

    def test_without_thresholds_it_is_the_original(self, case: Case) -> None:
        """Also with thresholds that merge nothing; square, long and, where the original takes them, partial patches."""
        p = case.patch_size
        uniform, unmerged = case.build(), case.build(thresholds=(-1.0, -1.0))
        partial = [(5 * p + 3, 3 * p - 1)] if case.takes_partial else []
        for size in ((4 * p, 4 * p), (3 * p, 6 * p), *partial):
            images = noise(2, 3, *size)
            with torch.no_grad():
                found, expected = maps_of(uniform(images)), maps_of(case.original(images))
                assert_maps_close(found, expected, self.tolerance)
                assert all(map_.std() > 0.05 for map_ in expected)
                assert all(map(torch.equal, maps_of(unmerged(images)), found))

    def test_any_size_runs(self, case: Case) -> None:
        p = case.patch_size
        model = case.build(thresholds=THRESHOLDS)
        tiny = [] if case.crops or case.least > 1 else [(1, 1), (3, 2 * p)]
        least = case.least * p
        for rows, columns in ((least, least), (2 * p + 1, 5 * p), (least, 7 * p - 1), (9 * p, least), *tiny):
            with torch.no_grad():
                (first, *_) = maps_of(model(photos(rows, columns)))
            divisor = first.shape[-1] // max(1, columns // p if case.crops else -(-columns // p))
            expected = [side // p if case.crops else -(-side // p) for side in (rows, columns)]
            assert [side // divisor for side in first.shape[2:]] == expected and first.isfinite().all()

    def test_an_image_does_not_depend_on_its_batch(self, case: Case) -> None:
        images = photos(6 * case.patch_size, 5 * case.patch_size)
        for options in ({"thresholds": THRESHOLDS}, {"thresholds": THRESHOLDS, "token_budget": BUDGET}):
            model = case.build(**options)
            with torch.no_grad():
                together = maps_of(model(images))
                swapped = maps_of(model(images[[2, 0, 1]]))
                for i in range(3):
                    alone = maps_of(model(images[i : i + 1]))
                    assert_maps_close([m[i : i + 1] for m in together], alone, 1e-5, 1e-5)
            assert_maps_close(swapped, [m[[2, 0, 1]] for m in together], 1e-5, 1e-5)

    def test_every_parameter_gets_a_gradient(self, case: Case) -> None:
        images = photos(5 * case.patch_size, 6 * case.patch_size)
        for options in ({}, {"token_budget": BUDGET}):
            for batch in (images, images[1:2], images[2:3]):  # patches of all scales, small ones only, large ones
                model = case.build(thresholds=THRESHOLDS, **options).train()
                sum(map_.square().sum() for map_ in maps_of(model(batch))).backward()
                lacking = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
                assert not lacking

    def test_weights_are_saved_and_loaded(self, case: Case) -> None:
        model, other = (case.build(thresholds=THRESHOLDS) for _ in range(2))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert not any(other.load_state_dict(torch.load(file, weights_only=True), strict=True))
        self.assert_same(model, other, case)

    def test_copies_answer_alike(self, case: Case) -> None:
        model = case.build(thresholds=THRESHOLDS)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            self.assert_same(model, other, case)

    def assert_same(self, model: nn.Module, other: nn.Module, case: Case) -> None:
        images = photos(4 * case.patch_size, 5 * case.patch_size)
        with torch.no_grad():
            assert all(map(torch.equal, maps_of(model(images)), maps_of(other(images))))

    def test_16_bits_stay_near_float32(self, case: Case) -> None:
        """Under autocast and with weights of 16 bits; scores are made in float32, so that patches are the same."""
        images, model = photos(4 * case.patch_size, 6 * case.patch_size), case.build(thresholds=THRESHOLDS)
        with torch.no_grad():
            expected = maps_of(model(images))
            bound = 0.05 * max(map_.abs().max().item() for map_ in expected)
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype=dtype):
                    found = maps_of(model(images))
                assert_maps_close([map_.float() for map_ in found], expected, bound)
            found = maps_of(model.bfloat16()(images.bfloat16()))
        assert_maps_close([map_.float() for map_ in found], expected, bound)

    def test_blocks_compile_and_export(self, name: str, case: Case) -> None:
        """On the rows of a layout in fixed shapes: the part that differs between families."""
        if self.is_traced(name):
            pytest.skip("traced as a whole")
        images, model = photos(4 * case.patch_size, 6 * case.patch_size), case.build(**self.budget())
        blocks = Blocks(case.backbone_of(model), images)
        with torch.no_grad():
            rows = blocks.embed(images)
            expected = blocks(rows)
            torch._dynamo.reset()
            compiled = torch.compile(blocks, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(rows), expected, atol=1e-5, rtol=1e-5)
            exported = torch.export.export(blocks, (rows,), strict=False).module()
            torch.testing.assert_close(exported(rows), expected, atol=1e-5, rtol=1e-5)

    def test_a_budget_compiles_and_exports_to_one_graph(self, name: str, case: Case) -> None:
        """Which is right for other images, too. To trace the choice of patches takes seconds, so not all cases do."""
        if not self.is_traced(name):
            pytest.skip("traced for its blocks alone")
        first, second = (photos(4 * case.patch_size, 6 * case.patch_size, seed) for seed in range(2))
        second = second.flip(0, 3)  # other places are flat
        model = case.build(**self.budget())
        with torch.no_grad():
            torch._dynamo.reset()
            counter = CompileCounter()
            compiled = torch.compile(model, fullgraph=True, backend=counter)
            exported = torch.export.export(model, (first,), strict=False).module()
            for images in (first, second):
                expected = maps_of(model(images))
                assert_maps_close(maps_of(compiled(images)), expected, 1e-5, 1e-5)
                assert_maps_close(maps_of(exported(images)), expected, 1e-5, 1e-5)
        assert counter.frame_count == 1

    def is_traced(self, name: str) -> bool:
        return name in (self.cases if self.traced is None else self.traced)

    def budget(self) -> dict[str, Any]:
        return {"thresholds": THRESHOLDS, "token_budget": BUDGET}
