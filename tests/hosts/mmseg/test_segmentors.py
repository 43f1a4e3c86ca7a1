"""MMSeg's segmentors on an adaptive backbone: training, prediction, flips, saved states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.runner import Runner, load_checkpoint

from support.references import noise
from support.tiny_segmentors import (  # noqa: F401 (a fixture)
    CLASSES,
    SEGMENTORS,
    TEST_MODES,
    backbone,
    mmseg_scope,
    samples,
    segmentor,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own


@pytest.mark.parametrize("size", [(32, 32), (48, 80)], ids=str)
@pytest.mark.parametrize("drop_padding", [False, True])
@pytest.mark.parametrize("kind", SEGMENTORS)
def test_a_segmentor_trains(kind: str, drop_padding: bool, size: tuple[int, int]) -> None:
    model = segmentor(kind, drop_padding=drop_padding).train()
    model.data_preprocessor.size, model.data_preprocessor.size_divisor = (64, 96), None
    data = model.data_preprocessor(samples(*size), training=True)
    assert data["inputs"].shape == (2, 3, 64, 96)
    losses = model.loss(**data)
    total = sum(value for name, value in losses.items() if "loss" in name)
    total.backward()
    assert total.isfinite()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("size", [(32, 32), (50, 70)], ids=str)
@pytest.mark.parametrize("mode", TEST_MODES)
@pytest.mark.parametrize("kind", SEGMENTORS)
def test_a_segmentor_predicts_masks_of_the_image_size(kind: str, mode: str, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        results = segmentor(kind, mode).eval().test_step(samples(*size))
    for result in results:
        assert result.pred_sem_seg.data.shape == (1, *size)
        assert result.seg_logits.data.shape == (CLASSES, *size) and result.seg_logits.data.isfinite().all()


@torch.inference_mode()
def test_flipped_images_have_flipped_patches() -> None:
    """Flips of test-time augmentation flip the patches if the image is divisible into patches."""
    model = segmentor().eval()
    batch = model.data_preprocessor(samples(32, 64))["inputs"]
    scale_map, flipped = (model.backbone.partition(x) for x in (batch, batch.flip(3)))
    assert torch.equal(flipped.flip(2), scale_map) and len(scale_map.unique()) == 2
    assert model.encode_decode(batch.flip(3), [{"img_shape": (32, 64)}] * 2).shape == (2, CLASSES, 32, 64)


def test_a_state_saved_by_the_runner_gives_the_same_output(tmp_path: Path) -> None:
    """A state saved by CheckpointHook after a training step, loaded in a new segmentor and in a backbone alone."""
    model, before = segmentor(), noise(1, 3, 32, 48)
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader={"dataset": [{k: v[i] for k, v in samples(32, 48).items()} for i in range(2)], "batch_size": 2,
                          "sampler": {"type": "DefaultSampler"}, "collate_fn": {"type": "pseudo_collate"}},
        train_cfg={"by_epoch": False, "max_iters": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 1}},
        default_scope="mmseg",
        experiment_name=tmp_path.name,
    )  # fmt: skip
    started = {name: value.clone() for name, value in model.state_dict().items()}
    runner.train()
    assert not torch.equal(model.backbone.coarse_embed.zero.bias, started["backbone.coarse_embed.zero.bias"])
    path = str(tmp_path / "iter_1.pth")
    fresh = segmentor()
    load_checkpoint(fresh, path, strict=True)
    alone = backbone(2, pretrained=path, class_token=model.backbone.cls_token is not None)
    alone.init_weights()
    with torch.no_grad():
        (expected,) = model.eval().backbone(before)
        assert torch.equal(fresh.eval().backbone(before)[0], expected) and torch.equal(alone(before)[0], expected)
        logits, found = (m.encode_decode(before, [{"img_shape": (32, 48)}]) for m in (model, fresh))
        assert torch.equal(found, logits)
