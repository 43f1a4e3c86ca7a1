"""Checkpoints: state dicts of other ViTs -> ours. Pure functions on dictionaries of tensors.

Understood so far: our own, timm's ViTs and EVAs (also inside MAE and DeiT files), MMSeg's VisionTransformer,
Detectron2's ViT, SAM's image encoder, and the files that DINOv2, DINOv3 and EVA-02 come in, each also as part of a
whole model.
"""

import argparse
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from apt_dense.checkpoint_names import (
    NEW,
    NOT_BACKBONE,
    StateDict,
    fold_class_position,
    is_table,
    rename,
    without_key_biases,
)
from apt_dense.positions import relative_table

class LoadReport(NamedTuple):
    """What became of each name, source names where there is one."""

    loaded: list[str]
    converted: list[str]  # loaded after a change of shape
    new: list[str]  # not in the checkpoint, and neutral as initialised
    missing: list[str]  # of the model, not in the checkpoint
    unused: list[str]  # of the checkpoint, with no counterpart by design (heads, later blocks, class token)
    unexpected: list[str]  # of the checkpoint, unknown

    def summary(self) -> str:
        """One line, with the names of everything that is not simply loaded."""
        counts = [f"{len(self.loaded)} loaded"]
        for field in ("converted", "new", "missing", "unused", "unexpected"):
            names = getattr(self, field)
            if names:
                counts.append(f"{len(names)} {field} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})")
        return "; ".join(counts)


def read_checkpoint(path: Path, safe_types: Sequence[Any] = ()) -> Mapping:
    """The content of a .safetensors file or of one written by ``torch.save``; pickled code is never run.

    Args:
        safe_types: further types that a pickle may hold beside tensors, plain containers and the command line
            arguments that MAE and others store.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged, of another format, or holds other pickled types.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Types that are allowed already must stay so, but torch takes back whatever it is given here.
        allowed = torch.serialization.get_safe_globals()
        wanted = (argparse.Namespace, *safe_types)
        with torch.serialization.safe_globals([kind for kind in wanted if kind not in allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any part of the two readers
        raise ValueError(
            f"checkpoint {path} cannot be read as weights: it is damaged, of another format, or holds pickled code, "
            f"which is not run{_culprit(error)}. Copy it again, or save its state dict alone"
        ) from error


def _culprit(error: Exception) -> str:
    """The pickled type that torch refused, if that is what went wrong."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it asks for {found[1]})" if found else ""


def unwrap(checkpoint: Mapping, backbone: bool = True) -> StateDict:
    """The backbone's state dict inside a checkpoint file's content.

    Looks into "state_dict", "model", "model_ema", "module"; keeps only what is below ``backbone.``,
    ``backbone.net.`` or ``image_encoder.`` where that exists, unless ``backbone`` is False.

    Raises:
        ValueError: if there is no dictionary of tensors inside.
    """
    state = checkpoint
    for key in ("state_dict", "model", "model_ema", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not state:
        found = list(checkpoint)[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"no state dict found in the checkpoint (it holds {found}); expected a dictionary of tensors")
    for prefix in ("module.", "backbone.", "net.", "image_encoder.") if backbone else ("module.",):
        below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = below or state
    return state


def resize_positions(pos_embed: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """A position embedding (1, P + n, C) of a square grid -> (1, num_prefix + grid rows * columns, C).

    Bicubic and antialiased, by timm. A class position (P = 1) that is not wanted is left out.

    Raises:
        ValueError: if n is no square, or positions of class and register tokens are wanted and there are none.
    """
    length = pos_embed.shape[1]
    counts = (0, 1) if num_prefix < 2 else (num_prefix,)
    has_prefix = next((p for p in counts if length > p and math.isqrt(length - p) ** 2 == length - p), None)
    if has_prefix is None or has_prefix < num_prefix:
        raise ValueError(
            f"pos_embed of shape {tuple(pos_embed.shape)} does not fit: expected a square grid of positions after "
            f"{num_prefix} class positions, or exactly {num_prefix + grid[0] * grid[1]} positions; "
            f"set img_size and class_token as in the checkpoint"
        )
    grid_part = resample_abs_pos_embed(pos_embed[:, has_prefix:], list(grid), num_prefix_tokens=0)
    return torch.cat([pos_embed[:, :num_prefix], grid_part], dim=1)


def fit_state(state: StateDict, model: nn.Module) -> tuple[StateDict, LoadReport]:
    """Rename and reshape a backbone's state dict for an ``APTViT``.

    Returns:
        The entries to load and the report. Shapes of the entries equal those of the model.

    Raises:
        ValueError: for a weight whose shape does not fit and cannot be converted.
    """
    target = model.state_dict()
    given = {id(value) for value in state.values()}
    fitted, converted, unused, unexpected = {}, [], [], []
    for name, value in _prepare(state, target, model).items():
        if name not in target:
            (unused if _is_unused(name, model) or is_table(name, value) else unexpected).append(name)
            continue
        value = _fit_shape(name, value, target[name].shape, model)
        if id(value) not in given:
            converted.append(name)
        if value.shape != target[name].shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in the checkpoint and {tuple(target[name].shape)} in the model; "
                f"set patch_size, embed_dim, mlp_ratio and num_heads as in the checkpoint"
            )
        fitted[name] = value
    absent = [name for name in target if name not in fitted]
    new = [name for name in absent if NEW.match(name)]
    missing = [name for name in absent if not NEW.match(name)]
    return fitted, LoadReport(list(fitted), converted, new, missing, unused, unexpected)


def _prepare(state: StateDict, target: StateDict, model: nn.Module) -> StateDict:
    """A state dict with our names, and with what the model keeps in another place moved there."""
    state = without_key_biases({rename(name, target): value for name, value in state.items()}, target)
    if model.cls_token is None or not model.no_embed_class or "pos_embed" not in target:
        return state
    return fold_class_position(state, target["pos_embed"].shape)


def _fit_shape(name: str, value: Tensor, shape: torch.Size, model: nn.Module) -> Tensor:
    """Positions resampled to the model's shape; everything else as it is."""
    if value.shape == shape:
        return value
    if name == "pos_embed":
        value = value.flatten(1, 2) if value.ndim == 4 else value  # SAM keeps a grid (1, h, w, C)
        return value if value.shape == shape else resize_positions(value, model.pos_grid, model.num_prefix_positions)
    if name.endswith((".rel_pos_h", ".rel_pos_w")):
        return relative_table(value, (shape[0] + 1) // 2)
    return value


def _is_unused(name: str, model: nn.Module) -> bool:
    """Whether a name that the model lacks belongs to a part that this model leaves out by design."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return len(model.blocks) <= int(block[1]) <= model.last_block
    return bool(NOT_BACKBONE.match(name)) or name.startswith(("coarse_embed.", "norm.", "cls_token"))


def load_backbone(model: nn.Module, checkpoint: Mapping, strict: bool = True) -> LoadReport:
    """Load a checkpoint's content into an ``APTViT``, converting as needed.

    Raises:
        ValueError: with ``strict``, for weights missing from the checkpoint or unknown to the model; always for
            shapes that do not fit.
    """
    state, report = fit_state(unwrap(checkpoint), model)
    if strict and (report.missing or report.unexpected):
        raise ValueError(f"the checkpoint does not fit the backbone: {report.summary()}{_hint(report)}")
    model.load_state_dict(state, strict=False)
    return report


def _hint(report: LoadReport) -> str:
    """Names that look alike, or else what is most often wrong."""
    pairs = [(name, difflib.get_close_matches(name, report.unexpected, 1, 0.8)) for name in report.missing]
    alike = [f"{ours} ~ {theirs[0]}" for ours, theirs in pairs if theirs]
    if alike:
        return f". Alike: {', '.join(alike[:3])}"
    return ". Set depth, class_token, qkv_bias and final_norm as in the checkpoint"
