"""Regions of interest: where patches must stay small, and where they shall be large whatever is to be seen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from apt_dense.patches.blocks_of_pixels import blocks
from apt_dense.patches.image_preparation import whole_patches

#: Regions of images (B, C, H, W): a mask (B, H, W) of truth values, one tensor (n, 4) of boxes x1, y1, x2, y2 in pixels
#: per image, or a function that makes one of these from the images.
Region: TypeAlias = Tensor | Sequence[Tensor] | Callable[[Tensor], Tensor | Sequence[Tensor]]


class Regions(NamedTuple):
    """Cells of the base grid whose patches do not depend on scores alone.

    Args:
        fine: (B, h, w) bool, cells that touch what must stay fine.
        coarse: (B, h, w) bool, cells that lie wholly inside what shall be coarse.
    """

    fine: Tensor
    coarse: Tensor

    def may_be_coarse(self, scale: int) -> Tensor:
        """Mark the patches (B, h >> scale, w >> scale) of a scale that touch nothing that must stay fine."""
        return ~_any_in_blocks(self.fine, 1 << scale)

    def shall_be_coarse(self, scale: int) -> Tensor:
        """Mark the patches (B, h >> scale, w >> scale) of a scale that lie wholly inside what shall be coarse, and
        touch nothing that must stay fine."""
        return ~_any_in_blocks(~self.coarse | self.fine, 1 << scale)


def regions_of(
    images: Tensor, keep_fine: Region | None, keep_coarse: Region | None, patch_size: int, partial_patches: str
) -> Regions | None:
    """Bring regions to the base grid; None if there are none.

    Args:
        images: (B, C, H, W) before they are brought to whole patches; what that adds is in no region.

    Raises:
        ValueError, TypeError: for regions of another kind, shape or number than the images.
    """
    if keep_fine is None and keep_coarse is None:
        return None
    nowhere = torch.zeros_like(images[:, 0], dtype=torch.bool)
    fine = nowhere if keep_fine is None else mask_of("keep_fine", keep_fine, images)
    coarse = nowhere if keep_coarse is None else mask_of("keep_coarse", keep_coarse, images)
    fine, coarse = (whole_patches(mask[:, None], patch_size, partial_patches)[:, 0] for mask in (fine, coarse))
    return Regions(_any_in_blocks(fine, patch_size), ~_any_in_blocks(~coarse, patch_size))


@torch.no_grad()
def mask_of(name: str, region: Region, images: Tensor) -> Tensor:
    """The mask (B, H, W) bool of a region of images (B, C, H, W). A box takes every pixel that it overlaps."""
    if callable(region):
        region = region(images)
    batch, (height, width) = len(images), images.shape[-2:]
    if isinstance(region, Tensor):
        if region.dtype != torch.bool:
            raise TypeError(f"{name} is a mask of {region.dtype}; expected torch.bool, such as mask > 0")
        if region.shape != (batch, height, width):
            raise ValueError(
                f"{name} is a mask of shape {tuple(region.shape)}; expected ({batch}, {height}, {width}), as the "
                f"images have, padding included"
            )
        return region.to(images.device)
    if isinstance(region, str | bytes) or not isinstance(region, Sequence):
        raise TypeError(f"{name} is {type(region).__name__}; expected a mask, boxes for each image, or a function")
    if len(region) != batch:
        raise ValueError(
            f"{name} has boxes for {len(region)} images, the batch has {batch}; give (0, 4) where none are"
        )
    return torch.stack([_mask_of_boxes(name, boxes, height, width, images.device) for boxes in region])


def _mask_of_boxes(name: str, boxes: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """The pixels (H, W) bool that boxes (n, 4) overlap."""
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        found = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
        raise ValueError(f"{name} has boxes {found} of an image; expected a tensor (n, 4) of x1, y1, x2, y2 in pixels")
    left, top, right, bottom = boxes.to(device, torch.float32)[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    # An empty box, whose right is not beyond its left, overlaps nothing.
    row = (rows < bottom) & (rows + 1 > top) & (bottom > top)
    column = (columns < right) & (columns + 1 > left) & (right > left)
    return row.float().T @ column.float() > 0


def _any_in_blocks(marked: Tensor, side: int) -> Tensor:
    """The whole blocks (B, h // side, w // side) of (B, h, w) that hold a marked one."""
    return blocks(marked, side).any(4).any(2)
