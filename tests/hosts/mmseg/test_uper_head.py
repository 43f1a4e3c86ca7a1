"""APTUPerHead: MMSegmentation's UPerHead, computed otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.tiny_segmentors import mmseg_scope  # noqa: F401

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.registry import MODELS

from apt_dense.hosts.mmseg import uper_head

from support.references import noise, randomise

HEAD: dict[str, Any] = {
    "in_channels": [8, 8, 8, 8], "in_index": [0, 1, 2, 3], "pool_scales": (1, 2, 3), "channels": 12, "num_classes": 5,
    "norm_cfg": {"type": "BN"}, "dropout_ratio": 0.0, "align_corners": False,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "as in the configs": {},
    "corners aligned": {"align_corners": True},
    "without norm": {"norm_cfg": None},
    "another activation": {"act_cfg": {"type": "GELU"}},
    "two levels": {"in_channels": [8, 8], "in_index": [0, 2]},
    "one level": {"in_channels": [8], "in_index": [1]},
}


def pair(changes: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Ours and MMSegmentation's, with the same weights."""
    own, plain = (MODELS.build({"type": kind, **HEAD, **changes}) for kind in ("APTUPerHead", "UPerHead"))
    plain.load_state_dict(randomise(own, 0.3).state_dict())
    return own, plain


def levels() -> list[Tensor]:
    return [noise(2, 8, side, side + 3).requires_grad_() for side in (29, 15, 8, 4)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of levels that were convolved at their own sizes."""
    found, plain = [], uper_head.conv_of_levels
    monkeypatch.setattr(uper_head, "conv_of_levels", lambda x, *rest: found.append(len(x)) or plain(x, *rest))
    return found


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:When align_corners=True")
def test_values_gradients_and_statistics(changes: dict[str, Any], calls: list[int]) -> None:
    results = []
    for head in pair(changes):
        inputs = levels()
        output = head.train()(inputs)
        output.square().sum().backward()
        used = [x.grad for x in inputs if x.grad is not None]
        statistics = [b for n, b in head.named_buffers() if "running" in n]
        results.append((output, used, [p.grad for p in head.parameters()], statistics))
    assert calls == [len({**HEAD, **changes}["in_index"])]
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
    assert results[0][0].std() > 0.01


@pytest.mark.parametrize("change", ["hook", "dilation", "subclass", "norm first", "traced"])
def test_else_it_is_mmsegmentations(change: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something else was made of the convolution."""
    own, plain = (head.eval() for head in pair({}))
    for head in (own, plain):
        last = head.fpn_bottleneck
        {
            "hook": lambda last=last: last.conv.register_forward_hook(lambda m, args, out: out + 1),
            "dilation": lambda last=last: last.conv.__setattr__("dilation", (2, 2)) or _pad(last.conv, 2),
            "subclass": lambda last=last: last.conv.__setattr__("__class__", _Doubled),
            "norm first": lambda last=last: setattr(last, "order", ("act", "conv", "norm")),
            "traced": lambda: None,
        }[change]()
    if change == "traced":
        monkeypatch.setattr(uper_head, "is_traced", lambda: True)
    with torch.no_grad():
        torch.testing.assert_close(own(levels()), plain(levels()))
    assert calls == []


def _pad(conv: nn.Conv2d, count: int) -> None:
    conv.padding = (count, count)


class _Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles(backend: str) -> None:
    own, plain = (head.eval() for head in pair({}))
    compiled: Callable[..., Tensor] = torch.compile(own, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(levels()), plain(levels()), atol=1e-4, rtol=1e-4)


def test_autocast() -> None:
    own, plain = (head.eval() for head in pair({}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(own(levels()), plain(levels()), atol=0.1, rtol=0.05)
