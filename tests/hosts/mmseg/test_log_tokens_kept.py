"""Shares of tokens in MMEngine's message hub: of each forward pass in training, of the whole loop otherwise."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("mmengine", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.logging import MessageHub

from apt_dense.hosts.mmseg import APTViT
from apt_dense.hosts.mmseg.log_tokens_kept import log_tokens_kept

from support.tiny_segmentors import SMALL, backbone, half_flat, mmseg_scope  # noqa: F401 (a fixture)


@pytest.fixture
def hub() -> Iterator[MessageHub]:
    """A message hub of its own as the current one."""
    before = MessageHub.get_current_instance().instance_name
    yield MessageHub.get_instance(uuid.uuid4().hex)
    MessageHub._instance_dict.move_to_end(before)


def current(hub: MessageHub, loop: str) -> float:
    return hub.get_scalar(f"{loop}/tokens_kept").current()


def test_validations_log_the_share_since_their_start(hub: MessageHub) -> None:
    hub.update_info("loop_stage", "val")
    for iteration, shares in ((4, (0.2, 0.8)), (8, (0.1, 0.7))):
        hub.update_info("iter", iteration)
        for share, cells in zip(shares, (10, 30), strict=True):
            log_tokens_kept(share, cells, training=False)
        assert current(hub, "val") == pytest.approx((shares[0] + 3 * shares[1]) / 4)
    hub.update_info("loop_stage", "test")
    log_tokens_kept(0.5, 10, training=False)
    assert current(hub, "test") == 0.5
    assert "val/tokens_kept" not in hub.state_dict()["log_scalars"], "nothing of it is resumed"


def test_training_logs_each_forward_pass_and_other_code_none(hub: MessageHub) -> None:
    log_tokens_kept(0.5, 10, training=False)
    hub.update_info("loop_stage", "train")
    log_tokens_kept(0.5, 10, training=False)
    assert not hub.log_scalars
    log_tokens_kept(0.25, 10, training=True)
    log_tokens_kept(0.75, 10, training=True)
    assert list(hub.get_scalar("train/tokens_kept").data[0]) == [0.25, 0.75]


def test_budgets_are_logged(hub: MessageHub) -> None:
    model = backbone(token_budget=0.7)
    hub.update_info("loop_stage", "val")
    images = half_flat(32, 64)
    model(images)
    tokens = model.patches.tokens_per_image((4, 8))
    assert 0.6 < tokens / 32 < 0.7 and current(hub, "val") == pytest.approx(tokens / 32)
    model.train()(images)
    assert current(hub, "train") == pytest.approx(tokens / 32)


def test_compiled_budgets_stay_one_graph(hub: MessageHub) -> None:
    model = APTViT(**SMALL, thresholds=(4.0,), token_budget=0.7)
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(half_flat(32, 64))[0], model(half_flat(32, 64))[0], atol=1e-5, rtol=1e-5)
    assert len(hub.get_scalar("train/tokens_kept").data[0]) == 1, "of the model that is not compiled"
