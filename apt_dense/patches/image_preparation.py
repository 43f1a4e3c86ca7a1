"""Images as hosts hand them over: checks, whole patches, the filled part, grey levels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.options import PixelFormat
from apt_dense.runtime import is_vmapped, require, runs_on_host


def check_images(images: Tensor, in_chans: int) -> Tensor:
    """The images themselves.

    Raises:
        ValueError: unless they are (B, in_chans, H, W) with at least one image of one pixel, whose values exist.
        TypeError: unless they are a dense tensor of floating point.
    """
    _check_tensor(images)
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, {in_chans}, H, W)")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; expected normalised floating point pixels (pixel_mean, pixel_std)")
    if images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected at least one image of one pixel")
    return images


def _check_tensor(images: Any) -> None:
    """Raise on what is no dense tensor with values."""
    kind = f"{type(images).__module__}.{type(images).__qualname__}".removeprefix("builtins.")
    if isinstance(images, torch.fx.Proxy):
        raise TypeError(f"images are a {kind}: torch.fx's symbolic tracing cannot follow them; use torch.export")
    if not isinstance(images, Tensor):
        raise TypeError(f"images are {kind}; expected one tensor (B, C, H, W), as torch.stack makes of a list")
    if images.is_nested or images.layout is not torch.strided:
        raise TypeError(
            f"images are a tensor of layout {images.layout}; expected a dense one (to_dense, to_padded_tensor)"
        )
    if is_vmapped(images):
        raise TypeError(
            "torch.vmap over images is not supported, since each image has its own number of patches; pass a batch "
            "(B, C, H, W) instead. vmap over the weights of several models (torch.func.stack_module_state) works"
        )
    if images.is_meta:
        raise ValueError(
            "images are on the device 'meta', which holds no pixels to choose patches by; give images of another "
            "device, and weights too (model.to_empty(device=...), then load them)"
        )


def whole_patches(images: Tensor, patch_size: int, partial_patches: str) -> Tensor:
    """Images (B, C, H, W), padded ("pad") or cropped ("crop") at the right and bottom to whole patches."""
    height, width = images.shape[-2:]
    if height % patch_size == 0 and width % patch_size == 0:
        return images
    if partial_patches == "pad":
        return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))
    if min(height, width) < patch_size:
        raise ValueError(
            f"images of {height} x {width} pixels hold no whole patch of {patch_size} pixels; "
            f"pad them, or set partial_patches='pad'"
        )
    return images[..., : height - height % patch_size, : width - width % patch_size]


def are_finite(images: Tensor) -> Tensor:
    """Check whether each image (B, C, H, W) is free of NaN and infinities: (B,) bool."""
    # A sum is finite if all of its terms are, and needs no mask of the size of the images.
    return images.detach().sum((1, 2, 3), dtype=torch.float32).isfinite()


def check_finite(finite: Sequence[int | bool]) -> None:
    """Raise a ValueError that names the images of a batch that are not finite."""
    bad = [i for i, ok in enumerate(finite) if not ok]
    if bad:
        raise ValueError(
            f"images {bad} of the batch hold NaN or infinite pixels; expected finite normalised pixels. "
            f"Look at their files and at the transforms before the backbone"
        )


def require_finite(images: Tensor) -> None:
    """Raise on images (B, C, H, W) with NaN or infinite pixels: on a CPU at once, naming them as :func:`check_finite`;
    compiled or on another device by an assertion, for which nothing waits."""
    finite = are_finite(images)
    if runs_on_host(finite):
        check_finite(finite.tolist())
    else:
        require(finite.all(), "the batch holds images with NaN or infinite pixels; look at the transforms before")


@torch.no_grad()
def filled_region(images: Tensor) -> Tensor:
    """Rows and columns (B, 2) that hold an image: up to the last row and column with a non-zero pixel.

    Hosts pad right and bottom with 0 after normalising, and 8-bit images whose mean is not a whole number never give an
    exact 0 in all channels (all 256 levels checked), so this finds their padding exactly. Zeros inside an image are
    part of it. An image of nothing but zeros counts as filled: no host makes padding alone.
    """
    filled = (images != 0).any(dim=1)
    extents = []
    for dim in (2, 1):  # rows: any column is filled; columns: any row is
        line = filled.any(dim=dim)
        place = torch.arange(1, line.shape[1] + 1, device=images.device)
        extent = (line * place).amax(1)
        extents.append(torch.where(extent > 0, extent, line.shape[1]))
    return torch.stack(extents, dim=1)


def denormalise(images: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Normalised images (B, 3, H, W) of any float type -> float32 RGB grey levels in [0, 255], whole numbers.

    Grey images (B, 1, H, W) become RGB ones of three equal channels.

    Normalising in float32 and back leaves an error of about 1e-5, and grey levels sit on the histogram's bin borders,
    where such an error would move a pixel to the next bin. Images that a host resized in floating point are rounded as
    if it had resized the 8-bit image: their fractions alone would raise the entropy of a grey photo by a bit.
    """
    # Channel by channel: a tensor of means would have to be copied to the device, which CUDA graphs do not record.
    last = images.shape[1] - 1
    channels = [images[:, min(i, last)].float() * pixel_format.std[i] + pixel_format.mean[i] for i in range(3)]
    ordered = channels if pixel_format.channel_order == "RGB" else channels[::-1]
    return torch.stack(ordered, 1).round_().clamp_(0, 255)


def rounded_mean(pixel_format: PixelFormat) -> tuple[float, ...]:
    """RGB grey levels of padding, which is 0 in normalised images, as :func:`denormalise` gives them."""
    return tuple(denormalise(torch.zeros(1, 3, 1, 1, device="cpu"), pixel_format).flatten().tolist())
