"""Check that a host normalises images as its model's adaptive ViT expects, which undoes that to score patches."""

from collections.abc import Sequence

from torch import Tensor, nn

from apt_dense.options import PixelFormat
from apt_dense.vit import APTViT

_TOLERANCE = 0.51  # grey levels: means are written as 123.675 or rounded, 124


def pixel_disagreement(
    model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, channel_order: str | None = None
) -> str | None:
    """Compare a host's normalisation with that of the adaptive ViTs in a model.

    Those without adaptive patches score nothing, and a callable scorer may not look at pixels: both pass.

    Args:
        mean, std: that the host normalises images by, in grey levels, of one channel or three.
        channel_order: of the host's images, "RGB" or "BGR"; None if it is not known.

    Returns:
        A sentence that names the difference; None if there is none.
    """
    given = [[float(value) for value in values] for values in (mean, std)]
    for net in (module for module in model.modules() if isinstance(module, APTViT)):
        patches = net.patches
        if callable(patches.scorer) or not (patches.thresholds or patches.token_budget):
            continue
        expected = net.pixel_format
        if not all(_agree(*pair) for pair in zip(given, (expected.mean, expected.std), strict=True)):
            return _describe(expected, f"mean={given[0]} and std={given[1]}")
        if channel_order is not None and net.in_chans == 3 and channel_order != expected.channel_order:
            return _describe(expected, f"channels in the order {channel_order}")
    return None


def _agree(given: Sequence[float], expected: Sequence[float]) -> bool:
    values = [*given] * 3 if len(given) == 1 else given
    return len(values) == 3 and all(abs(a - b) <= _TOLERANCE for a, b in zip(values, expected, strict=True))


def _describe(expected: PixelFormat, given: str) -> str:
    return (
        f"images come with {given}, but the backbone undoes pixel_mean={expected.mean}, pixel_std={expected.std}, "
        f"channel_order={expected.channel_order!r} to score patches; give it those of the images"
    )
