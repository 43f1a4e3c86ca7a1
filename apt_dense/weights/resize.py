"""Weights for patches and images of another size, resampled by timm. Pure functions on tensors and dictionaries.

A position embedding is (1, P + rows * columns, C): P prefix positions, of class and register tokens, and then a grid.
Its shape alone tells neither P nor the grid; :func:`split_prefix` is the only place that tells them apart. SAM keeps
(1, rows, columns, C), which tells both.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from timm.layers import resample_abs_pos_embed_nhwc, resample_patch_embed
from torch import Tensor

from apt_dense.weights.formats import StateDict

Grid = tuple[int, int]  # rows, columns


class Misfit(ValueError):
    """A weight that does not fit a model.

    Args:
        problem: what is wrong.
        remedy: what to do if nothing better is known.
        alternative: what can be done instead.
    """

    def __init__(self, problem: str, remedy: str, alternative: str = "") -> None:
        super().__init__(f"{problem}; {remedy}{alternative}")
        self.problem, self.remedy, self.alternative = problem, remedy, alternative


# ---- prefix and grid


def split_prefix(pos_embed: Tensor, counts: Sequence[int], grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Split a position embedding into its prefix (1, P, C) and its grid (1, rows, columns, C).

    Args:
        pos_embed: (1, P + rows * columns, C) or (1, rows, columns, C).
        counts: plausible values of P, see :func:`prefix_counts`.
        grid: rows and columns, if known. Otherwise the grid is taken for a square.

    Raises:
        ValueError: if the shape does not have that grid, or allows no square or several.
    """
    single = len(pos_embed) == 1 if pos_embed.ndim else False
    if single and pos_embed.ndim == 4 and grid in (None, tuple(pos_embed.shape[1:3])):
        return pos_embed.flatten(1, 2)[:, :0], pos_embed
    found = _readings(pos_embed.shape[1], counts, grid) if single and pos_embed.ndim == 3 else []
    if len(found) != 1:
        raise _cannot_split(pos_embed, counts, grid, found)
    [(prefix, grid)] = found
    return pos_embed[:, :prefix], pos_embed[:, prefix:].unflatten(1, grid)


def join_prefix(prefix: Tensor, cells: Tensor) -> Tensor:
    """Join (1, P, C) and (1, rows, columns, C) to (1, P + rows * columns, C); the inverse of :func:`split_prefix`."""
    return torch.cat([prefix, cells.flatten(1, 2)], dim=1)


def prefix_counts(state: StateDict) -> tuple[int, ...]:
    """List the numbers of prefix positions that a state dict with our names may have: none, one of a class token (which
    detectors keep without the token), or one per class and register token."""
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    return tuple(sorted({0, 1, registers + ("cls_token" in state)}))


def _readings(length: int, counts: Sequence[int], grid: Grid | None) -> list[tuple[int, Grid]]:
    """All (P, grid) that give a number of positions."""
    pairs = [(count, grid or (math.isqrt(length - count),) * 2) for count in counts if count < length]
    return [(count, cells) for count, cells in pairs if count + math.prod(cells) == length]


def _cannot_split(pos_embed: Tensor, counts: Sequence[int], grid: Grid | None, found: list[tuple[int, Grid]]) -> Misfit:
    numbers = " or ".join(map(str, counts))
    if found:
        options = " or ".join(f"{rows} x {columns} after {count}" for count, (rows, columns) in found)
        problem = f"its grid may be {options} prefix positions"
    elif grid is not None:
        problem = f"it is not a grid of {grid[0]} x {grid[1]} after {numbers} prefix positions"
    else:
        problem = f"it is not a square grid after {numbers} prefix positions (class and register tokens)"
    return Misfit(
        f"pos_embed of shape {tuple(pos_embed.shape)} does not fit: {problem}",
        "name the checkpoint's rows and columns (grid=, --grid), or set img_size and class_token as in the checkpoint",
    )


# ---- the grid that a state dict knows of


def note_grid(state: Mapping, prefix: str, grid: Grid) -> None:
    """Note the grid of the ``pos_embed`` below ``prefix`` in the metadata that torch keeps with a state dict."""
    if hasattr(state, "_metadata"):
        # A new mapping, since load_state_dict hands modules a copy of the state dict with the caller's own metadata.
        metadata, key = state._metadata.copy(), prefix.removesuffix(".")
        metadata[key] = {**metadata.get(key, {}), "pos_grid": tuple(grid)}
        state._metadata = metadata


def noted_grid(state: Mapping, prefix: str | None = None) -> Grid | None:
    """Read what :func:`note_grid` noted for ``prefix``; without a prefix, what it noted for all prefixes, if they
    agree."""
    metadata = getattr(state, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return None
    entries = metadata.values() if prefix is None else [metadata.get(prefix.removesuffix("."))]
    noted = [entry for entry in entries if isinstance(entry, Mapping) and "pos_grid" in entry]
    grids = {grid_in(entry) for entry in noted}
    return grids.pop() if len(grids) == 1 else None


def grid_in(entry: Mapping) -> Grid | None:
    """The grid in an entry of a file's metadata, which may hold anything."""
    value = entry.get("pos_grid")
    is_pair = isinstance(value, tuple) and len(value) == 2
    return value if is_pair and all(type(size) is int and size > 0 for size in value) else None


def source_grid(state: StateDict, grid: Grid | None, noted: Grid | None) -> Grid | None:
    """Choose the grid of a state dict with our names: the user's ``grid``, or else the noted one if it can be true of
    the positions, which may have been resampled since."""
    positions = state.get("pos_embed")
    if grid is not None or noted is None or positions is None or positions.ndim != 3:
        return grid
    return noted if _readings(positions.shape[1], prefix_counts(state), noted) else None


def require_known_grid(state: StateDict, grid: Grid, num_prefix: int) -> None:
    """Raise where nobody says the grid of positions that may be a model's rectangle or a square: 576 may be 18 x 32 or
    24 x 24.

    Args:
        state: with our names.
        grid: rows and columns of the model.
        num_prefix: prefix positions of the model.

    Raises:
        ValueError: with both grids.
    """
    positions = state.get("pos_embed")
    if positions is None or grid[0] == grid[1] or not positions_fit(positions, grid, num_prefix):
        return
    counts = [count for count in prefix_counts(state) if _takes(num_prefix, count)]
    squares = _readings(positions.shape[1], counts, None)
    if squares:
        raise _cannot_split(positions, counts, None, [(num_prefix, tuple(grid)), *squares])


# ---- resampling


def positions_fit(pos_embed: Tensor, grid: Grid, num_prefix: int, source: Grid | None = None) -> bool:
    """Check whether positions fit a model as they are. Where their own grid (``source``) is unknown, the model decides,
    which knows its grid."""
    count = num_prefix + math.prod(grid)
    return pos_embed.ndim == 3 and pos_embed.shape[1] == count and source in (None, tuple(grid))


def resize_positions(
    pos_embed: Tensor, grid: Grid, num_prefix: int, source: Grid | None = None, counts: Sequence[int] | None = None
) -> Tensor:
    """Resample a position embedding to (1, num_prefix + rows * columns, C): bicubic and antialiased, by timm.

    A class position that the model has no place for is left out.

    Args:
        pos_embed: (1, P + n, C) or (1, rows, columns, C).
        grid: rows and columns of the model.
        num_prefix: prefix positions of the model.
        source: rows and columns of ``pos_embed``, if known; see :func:`split_prefix`.
        counts: plausible values of P; by default 0, 1 and ``num_prefix``.

    Raises:
        ValueError: if P or the grid cannot be told, or the model wants other prefix positions than there are.
    """
    if positions_fit(pos_embed, grid, num_prefix, source):
        return pos_embed
    prefix, cells = split_prefix(pos_embed, sorted({0, 1, num_prefix}) if counts is None else counts, source)
    found = prefix.shape[1]
    if not _takes(num_prefix, found):
        raise Misfit(
            f"pos_embed of shape {tuple(pos_embed.shape)} does not fit: it has {found} prefix positions and the model "
            f"{num_prefix}",
            "set img_size and class_token as in the checkpoint",
        )
    return join_prefix(prefix[:, :num_prefix], resample_abs_pos_embed_nhwc(cells, list(grid)))


def fold_class_position(state: StateDict, grid: Grid, source: Grid | None = None) -> StateDict:
    """Add the position of a class token to the token, for models that give it none (``no_embed_class``).

    Args:
        state: a state dict with our names.
        grid: rows and columns of the model.
        source: those of the state dict, if known.

    Returns:
        The entries that change, ``cls_token`` and ``pos_embed`` (1, rows, columns, C); none if there is no class
        position.
    """
    positions, token = state.get("pos_embed"), state.get("cls_token")
    if positions is None or token is None or positions_fit(positions, grid, 0, source):
        return {}
    prefix, cells = split_prefix(positions, prefix_counts(state), source)
    return {"cls_token": token.detach() + prefix.detach(), "pos_embed": cells} if prefix.shape[1] == 1 else {}


def _takes(num_prefix: int, found: int) -> bool:
    """Check whether a model of ``num_prefix`` prefix positions takes positions that have ``found``: as many, or that of
    a class token that it leaves out."""
    return found == num_prefix or (found, num_prefix) == (1, 0)


def resize_state(
    state: StateDict, patch_size: int | None = None, img_size: tuple[int, int] | None = None, grid: Grid | None = None
) -> StateDict:
    """Resample a state dict with our names for patches of another size (FlexiViT's pseudo-inverse) and for images of
    another size (bicubic), both by timm.

    Args:
        img_size: pixels (H, W); None keeps the grid of positions, so that images grow or shrink with the patches.
        grid: rows and columns of the positions in ``state``; None takes those that it says or a square.

    Raises:
        ValueError: for sizes below 1 or that do not divide, and for positions whose grid cannot be told.
    """
    state, weight = dict(state), state["patch_embed.proj.weight"]
    size = weight.shape[-1] if patch_size is None else patch_size
    if size < 1:
        raise ValueError(f"patch_size={size}: expected at least 1 pixel")
    state["patch_embed.proj.weight"] = resample_patches(weight, size)
    if img_size is not None and "pos_embed" in state:
        if min(img_size) < size or any(pixels % size for pixels in img_size):
            raise ValueError(f"img_size={img_size} is not a multiple of patches of {size} pixels")
        state["pos_embed"] = _regrid(state, (img_size[0] // size, img_size[1] // size), grid)
    return state


def _regrid(state: StateDict, grid: Grid, source: Grid | None) -> Tensor:
    """Resample positions, keeping their prefix or, where they have the shape of a grid, that shape."""
    prefix, cells = split_prefix(state["pos_embed"], prefix_counts(state), source)
    cells = resample_abs_pos_embed_nhwc(cells, list(grid))
    return cells if state["pos_embed"].ndim == 4 else join_prefix(prefix, cells)


def resample_patches(weight: Tensor, patch_size: int) -> Tensor:
    """Resample the weight (C, in_chans, p, p) of a patch embedding to (C, in_chans, patch_size, patch_size)."""
    if weight.shape[-2:] == (patch_size, patch_size):
        return weight
    return resample_patch_embed(weight, [patch_size, patch_size])
