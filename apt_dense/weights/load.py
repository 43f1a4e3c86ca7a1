"""Load the checkpoints of other ViTs into an ``APTViT``.

Understood: our own, timm's ViTs and EVAs (also inside MAE and DeiT files), MMSeg's VisionTransformer, Detectron2's ViT,
SAM's image encoder, the APT release, and the files of DINOv2, DINOv3, EVA-02 and its detectors, each also as part of a
whole model. Conversions that need no model are in convert.py.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apt_dense.nn.relative import relative_table
from apt_dense.weights.argument_advice import advice
from apt_dense.weights.convert import to_apt, without_key_biases
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.find_backbone_weights import innermost, unwrap
from apt_dense.weights.formats import NOT_BACKBONE, StateDict, is_table, may_be_absent
from apt_dense.weights.parameter_rules import is_new
from apt_dense.weights.resize import (
    Grid,
    Misfit,
    fold_class_position,
    note_grid,
    noted_grid,
    positions_fit,
    prefix_counts,
    require_known_grid,
    resample_patches,
    resize_positions,
    source_grid,
)
from apt_dense.weights.tensor_checks import check_names

_PATCHES = "patch_embed.proj.weight"
_ALTERNATIVE = ", or resize_patches=True to resample it"


class LoadReport(NamedTuple):
    """The fate of each name, by source names where there is one. ``str()`` gives its summary."""

    loaded: list[str]
    converted: list[str]  # loaded after a change of shape
    new: list[str]  # not in the checkpoint, and neutral as initialised
    missing: list[str]  # of the model, not in the checkpoint
    unused: list[str]  # of the checkpoint, with no counterpart by design (heads, later blocks, class token)
    unexpected: list[str]  # of the checkpoint, unknown
    advice: str = ""  # the arguments of the model to change, where weights are missing or unexpected

    def summary(self) -> str:
        """Summarise in one line, with the names of everything that is not simply loaded, and the advice."""
        counts = [f"{len(self.loaded)} loaded"]
        for field in ("converted", "new", "missing", "unused", "unexpected"):
            names = getattr(self, field)
            if names:
                counts.append(f"{len(names)} {field} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})")
        return "; ".join([*counts, self.advice] if self.advice else counts)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"LoadReport({self.summary()})"  # all names of a large model would fill a screen


class _Fit(NamedTuple):
    """A state dict fitted to a model."""

    state: StateDict  # what to load, in the shapes of the model
    left: StateDict  # what the model has no place for, tables excepted
    report: LoadReport


# ---- fitting a state dict to a model


def fit_state(
    state: StateDict, model: nn.Module, resize_patches: bool = False, grid: Grid | None = None
) -> tuple[StateDict, LoadReport]:
    """Rename and reshape a backbone's state dict for an ``APTViT``.

    Args:
        resize_patches: resample the patch embedding to the model's patch size (FlexiViT's way, by timm).
        grid: rows and columns of the positions in ``state``; see :func:`load_backbone`.

    Returns:
        The entries to load and the report. Shapes of the entries equal those of the model.

    Raises:
        ValueError: for a weight whose shape does not fit and cannot be converted.
    """
    ours = to_apt(state)
    fit = _fit(ours, model, resize_patches, source_grid(ours, grid, noted_grid(state)))
    return fit.state, fit.report


def _fit(state: StateDict, model: nn.Module, resize_patches: bool, grid: Grid | None) -> _Fit:
    """Reshape a state dict with our names for a model. Reports and errors name the arguments to change."""
    target = model.state_dict()
    split = without_key_biases(state, target)

    def remedy() -> str:
        known = {name: value for name, value in split.items() if name in target or not is_table(name, value)}
        return advice(known, model, resize_patches, grid)

    changed = {name: value for name, value in split.items() if name not in state}
    try:
        changed |= _fit_positions(split, model, grid) if "pos_embed" in target else {}
        changed |= _fit_shapes(split, target, model.patch_size if resize_patches else None)
        whole = {**split, **changed}
        fitted = {name: value for name, value in whole.items() if name in target}
        _check_shapes(fitted, target)
    except Misfit as error:
        raise ValueError(f"{error.problem}; {remedy() or error.remedy}{error.alternative}") from error
    others = {name: value for name, value in whole.items() if name not in target}
    left = {name: value for name, value in others.items() if not is_table(name, value)}
    report = _report(fitted, changed, others, target, model)
    if report.missing or report.unexpected:
        report = report._replace(advice=remedy())
    return _Fit(fitted, left, report)


def _fit_positions(state: StateDict, model: nn.Module, grid: Grid | None) -> StateDict:
    """Resample positions to the model's; the class position goes into the token if the model has no place for it."""
    if "pos_embed" not in state:
        return {}
    changed = {}
    if model.no_embed_class and model.cls_token is not None:
        changed = fold_class_position(state, model.pos_grid, grid)
    positions = {**state, **changed}["pos_embed"]
    if not positions_fit(positions, model.pos_grid, model.num_prefix_positions, grid):
        changed["pos_embed"] = resize_positions(
            positions, model.pos_grid, model.num_prefix_positions, grid, prefix_counts(state)
        )
    return changed


def _fit_shapes(state: StateDict, target: StateDict, patch_size: int | None) -> StateDict:
    """Resample relative positions, and patches if a size is given, where their shape is not the model's."""
    changed = {}
    for name, value in state.items():
        shape = target[name].shape if name in target else value.shape
        if value.shape == shape:
            continue
        if name == _PATCHES and patch_size is not None and value.shape[:2] == shape[:2]:
            changed[name] = resample_patches(value, patch_size)
        if name.endswith((".rel_pos_h", ".rel_pos_w")):
            changed[name] = relative_table(value, (shape[0] + 1) // 2)
    return changed


def _check_shapes(state: StateDict, target: StateDict) -> None:
    """Raise for the first weight whose shape is not the model's."""
    for name, value in state.items():
        if value.shape != target[name].shape:
            raise Misfit(
                f"{name} is {tuple(value.shape)} in the checkpoint and {tuple(target[name].shape)} in the model",
                "set patch_size, embed_dim, mlp_ratio and num_heads as in the checkpoint",
                _ALTERNATIVE if name == _PATCHES and value.shape[-1] != target[name].shape[-1] else "",
            )


def _report(
    fitted: StateDict, changed: StateDict, others: StateDict, target: StateDict, model: nn.Module
) -> LoadReport:
    unused = {name: None for name, value in others.items() if _is_unused(name, model) or is_table(name, value)}
    absent = [name for name in target if name not in fitted]
    return LoadReport(
        loaded=list(fitted),
        converted=[name for name in fitted if name in changed],
        new=[name for name in absent if may_be_absent(name)],
        missing=[name for name in absent if not may_be_absent(name)],
        unused=list(unused),
        unexpected=[name for name in others if name not in unused],
    )


def _is_unused(name: str, model: nn.Module) -> bool:
    """Check whether a name that the model lacks belongs to a part that this model leaves out by design."""
    block = re.match(r"blocks\.(\d{1,6})\.", name)
    if block:
        return len(model.blocks) <= int(block[1]) < model.depth
    return bool(NOT_BACKBONE.match(name)) or is_new(name) or name.startswith(("norm.", "cls_token"))


# ---- loading


def convert_below(model: nn.Module, state: dict[str, Tensor], prefix: str, noted: Grid | None = None) -> LoadReport:
    """Convert the entries of ``state`` below ``prefix``, in place, to those of an ``APTViT``: our names, positions
    resampled, tables of rotary positions taken out. Weights without a place stay, with our names.

    Args:
        noted: the grid in torch's metadata for this prefix, where ``state`` has not kept its metadata.

    Raises:
        ValueError: for a weight whose shape does not fit; ``state`` is as it was.
    """
    check_names(state)
    below = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ours = to_apt(below)
    fit = _fit(ours, model, False, source_grid(ours, None, noted or noted_grid(state, prefix)))
    for name in below:
        del state[prefix + name]
    state.update({prefix + name: value for name, value in {**fit.left, **fit.state}.items()})
    # The positions are the model's now; what is noted must not be used on them a second time.
    note_grid(state, prefix, model.pos_grid)
    return fit.report


def load_backbone(
    model: nn.Module,
    checkpoint: Mapping | str | Path,
    strict: bool = True,
    resize_patches: bool = False,
    grid: Grid | None = None,
) -> LoadReport:
    """Load a checkpoint into an ``APTViT``, converting as needed.

    Positions are resampled to the model's; patches of another size only with ``resize_patches``, since every number of
    the patch embedding then changes.

    Args:
        model: an ``APTViT``; of a detector or segmentor, its backbone.
        checkpoint: a file, or the content of one; read by :func:`apt_dense.weights.files.read_checkpoint`.
        strict: refuse checkpoints with missing or unknown weights.
        grid: rows and columns that the checkpoint's positions were trained for. By default those noted in the
            checkpoint, those of the model if it has as many positions, or else a square. Where both would do and the
            model's ``pretrain_img_size`` does not say which, an error asks.

    Returns:
        What became of each weight; ``print`` it for a line.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for another model.
        ValueError: with ``strict``, for weights missing from the checkpoint or unknown to the model; always for
            unreadable files, shapes that do not fit, and positions whose grid cannot be told. It names the arguments of
            the model to change.
    """
    _check_model(model)
    content = read_checkpoint(Path(checkpoint).expanduser()) if isinstance(checkpoint, str | Path) else checkpoint
    ours = to_apt(unwrap(content))
    grid = source_grid(ours, grid, noted_grid(innermost(content)))
    if grid is None and model.pos_embed is not None and model.position_options.pretrain_img_size is None:
        require_known_grid(ours, model.pos_grid, model.num_prefix_positions)
    fit = _fit(ours, model, resize_patches, grid)
    if strict and (fit.report.missing or fit.report.unexpected):
        raise ValueError(f"the checkpoint does not fit the backbone: {fit.report.summary()}{_hint(fit.report)}")
    own = model.state_dict()
    with torch.no_grad():
        for name, value in fit.state.items():
            own[name].copy_(value)
    return fit.report


def _check_model(model: nn.Module) -> None:
    """Raise TypeError for what is no backbone, naming the one inside a model that has one."""
    if hasattr(model, "pos_grid") and isinstance(model, nn.Module):
        return
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = [name for name, module in modules if hasattr(module, "pos_grid")]
    remedy = f"; give its backbone, model.{inside[0]}" if inside else ", the file or state dict after it"
    raise TypeError(f"load_backbone takes an APTViT, not {type(model).__name__}{remedy}")


def _hint(report: LoadReport) -> str:
    """List names that look alike, unless the report says which arguments to change."""
    if report.advice:
        return ""
    # Comparing all of a large file's names with each other would take minutes.
    missing, unexpected = report.missing[:20], report.unexpected[:1000]
    pairs = [(name, difflib.get_close_matches(name, unexpected, 1, 0.8)) for name in missing]
    alike = [f"{ours} ~ {theirs[0]}" for ours, theirs in pairs if theirs]
    if alike:
        return f". Alike: {', '.join(alike[:3])}"
    return ". It is not the file of a whole ViT that is known; docs/CHECKPOINTS.md lists those that are read"
