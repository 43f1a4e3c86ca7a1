"""Schedules on models as hosts hand them over: wrapped, compiled, with several backbones; tests/tools/
test_patch_schedules.py has runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from apt_dense import APTViT
from apt_dense.hosts.anneal_patches import AnnealedPatches
from apt_dense.patches.schedule import PatchSchedule

from support.references import pictures
from support.threads import one_thread  # noqa: F401 (a fixture)

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
WHOLE_RUN = PatchSchedule(end=1.0)


def vit(**options: object) -> APTViT:
    return APTViT(**TINY, **{"thresholds": (4.0, 3.0, 2.0), **options})


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_models_train_through_the_schedule(process_group: None) -> None:
    """Without a scale at first, and with all parameters in use all the same."""
    backbone = vit()
    model = nn.parallel.DistributedDataParallel(nn.Sequential(backbone))
    target, images, kept = backbone.patches, pictures(0, (32, 32)), []
    patches = AnnealedPatches(model, WHOLE_RUN, 5)
    for iteration in range(5):
        in_force = patches.set(iteration)
        assert in_force == {f"threshold_{n}": (5 - n) * iteration / 4 for n in (1, 2, 3)}
        assert list(in_force.values()) == list(backbone.thresholds)
        sum(out.sum() for out in model(images)).backward()
        assert all(p.grad is not None for p in model.parameters())
        kept.append(backbone.patches.tokens_kept(images).mean().item())
        assert patches.reached(iteration) == (iteration == 4)
    assert kept == sorted(kept, reverse=True) and kept[0] == 1 > kept[-1]
    assert backbone.patches == target


def test_each_backbone_has_its_own_target() -> None:
    model = nn.ModuleList([vit(token_budget=0.5), vit()])
    patches = AnnealedPatches(model, WHOLE_RUN, 3)
    assert patches.set_as_after(0) == {"token_budget": 1.0}
    assert patches.set_as_after(2) == patches.set(1) == {"token_budget": 0.75}
    assert model[0].thresholds == (4.0, 3.0, 2.0) and model[1].thresholds == (2.0, 1.5, 1.0)
    patches.restore()
    assert model[0].token_budget == 0.5 and model[1].thresholds == (4.0, 3.0, 2.0)


def test_models_without_anything_to_anneal_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no APTViT inside"):
        AnnealedPatches(nn.Linear(1, 1), WHOLE_RUN, 3)
    with pytest.raises(ValueError, match="nothing to anneal"):
        AnnealedPatches(vit(thresholds=()), WHOLE_RUN, 3)


def test_compiled_models_with_a_budget_need_few_steps() -> None:
    model = vit(token_budget=0.5)
    compiled = nn.Sequential(torch.compile(model))
    for steps in None, 99:
        for one, by_host in (compiled, False), (model, True):
            with pytest.raises(ValueError, match=rf"steps={steps} with a compiled model .* Set steps to at most \d"):
                AnnealedPatches(one, PatchSchedule(steps=steps), 9, by_host)
    AnnealedPatches(compiled, PatchSchedule(steps=4), 9)
    AnnealedPatches(model, PatchSchedule(), 9)
    AnnealedPatches(torch.compile(vit()), PatchSchedule(), 9)  # thresholds make no graphs
    in_place = vit(token_budget=0.5)
    in_place.compile()
    with pytest.raises(ValueError, match="with a compiled model"):
        AnnealedPatches(in_place, PatchSchedule(), 9)


def test_another_schedule_is_told_from_the_one_before() -> None:
    model = vit()
    saved = AnnealedPatches(model, PatchSchedule(end=0.4), 9).state()
    assert AnnealedPatches(model, PatchSchedule(end=0.4), 9).differences(saved) == []
    assert AnnealedPatches(model, PatchSchedule(end=0.6), 8).differences(saved) == [
        "end: 0.4, now 0.6",
        "iterations: 9, now 8",
    ]
