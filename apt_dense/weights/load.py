"""Checkpoints: state dicts of other ViTs -> ours. Pure functions on dictionaries of tensors.

Understood: our own, timm's ViTs and EVAs (also inside MAE and DeiT files), MMSeg's VisionTransformer, Detectron2's ViT,
SAM's image encoder, the APT release, and the files that DINOv2, DINOv3, EVA-02 and its detectors come in, each also as
part of a whole model. ``conversions.py`` has what needs no model.
"""

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Size, Tensor, nn

from apt_dense.nn.relative import relative_table
from apt_dense.weights.convert import to_apt
from apt_dense.weights.formats import (
    NEW,
    NOT_BACKBONE,
    StateDict,
    fold_class_position,
    is_table,
    without_key_biases,
)
from apt_dense.weights.resize import resample_patches, resize_positions


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


def unwrap(checkpoint: Mapping, backbone: bool = True) -> StateDict:
    """The backbone's state dict inside a checkpoint file's content.

    Looks into "state_dict", "model", "model_ema", "module"; keeps only what is below ``backbone.``,
    ``backbone.net.``, ``net.`` or ``image_encoder.`` where that exists, unless ``backbone`` is False.

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
    for prefix in ("module.", "backbone.", "net.", "_orig_mod.", "image_encoder.") if backbone else ("module.",):
        below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = below or state
    return state


def fit_state(state: StateDict, model: nn.Module, resize_patches: bool = False) -> tuple[StateDict, LoadReport]:
    """Rename and reshape a backbone's state dict for an ``APTViT``.

    Args:
        resize_patches: resample the patch embedding to the model's patch size (FlexiViT's way, by timm).

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
        value = _fit_shape(name, value, target[name].shape, model, resize_patches)
        if id(value) not in given:
            converted.append(name)
        if value.shape != target[name].shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in the checkpoint and {tuple(target[name].shape)} in the model; "
                f"set patch_size, embed_dim, mlp_ratio and num_heads as in the checkpoint{_hint_of_patches(name)}"
            )
        fitted[name] = value
    absent = [name for name in target if name not in fitted]
    new = [name for name in absent if NEW.match(name)]
    missing = [name for name in absent if not NEW.match(name)]
    return fitted, LoadReport(list(fitted), converted, new, missing, unused, unexpected)


def _prepare(state: StateDict, target: StateDict, model: nn.Module) -> StateDict:
    """A state dict with our names, and with what the model keeps in another place moved there."""
    state = without_key_biases(to_apt(state), target)
    if model.cls_token is None or not model.no_embed_class or "pos_embed" not in target:
        return state
    return fold_class_position(state, target["pos_embed"].shape)


def _hint_of_patches(name: str) -> str:
    return ", or resize_patches=True to resample it" if name == "patch_embed.proj.weight" else ""


def _fit_shape(name: str, value: Tensor, shape: Size, model: nn.Module, resize_patches: bool) -> Tensor:
    """Positions resampled to the model's shape, and patches if asked; everything else as it is."""
    if value.shape == shape:
        return value
    if name == "pos_embed":
        return resize_positions(value, model.pos_grid, model.num_prefix_positions)
    if name == "patch_embed.proj.weight" and resize_patches and value.shape[:2] == shape[:2]:
        return resample_patches(value, model.patch_size)
    if name.endswith((".rel_pos_h", ".rel_pos_w")):
        return relative_table(value, (shape[0] + 1) // 2)
    return value


def _is_unused(name: str, model: nn.Module) -> bool:
    """Whether a name that the model lacks belongs to a part that this model leaves out by design."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return len(model.blocks) <= int(block[1]) <= model.depth - 1
    return bool(NOT_BACKBONE.match(name)) or name.startswith(("coarse_embed.", "norm.", "cls_token"))


def convert_below(model: nn.Module, state: dict[str, Tensor], prefix: str) -> LoadReport:
    """Convert the entries of ``state`` below ``prefix``, in place, to those of an ``APTViT``: our names, positions
    resampled, tables of rotary positions taken out. What has no place stays, with our name.

    Raises:
        ValueError: for a weight whose shape does not fit; ``state`` is as it was.
    """
    below = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ours = to_apt(below)
    fitted, report = fit_state(ours, model)
    for name in below:
        del state[prefix + name]
    left = {name: ours[name] for name in report.unused + report.unexpected if not is_table(name, ours[name])}
    state.update({prefix + name: value for name, value in {**left, **fitted}.items()})
    return report


def load_backbone(
    model: nn.Module, checkpoint: Mapping, strict: bool = True, resize_patches: bool = False
) -> LoadReport:
    """Load a checkpoint's content into an ``APTViT``, converting as needed.

    Positions are resampled to the model's; patches of another size only with ``resize_patches``, since every number of
    the patch embedding then changes.

    Raises:
        ValueError: with ``strict``, for weights missing from the checkpoint or unknown to the model; always for
            shapes that do not fit.
    """
    state, report = fit_state(unwrap(checkpoint), model, resize_patches)
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
