"""The arguments of ``APTViT`` that a checkpoint tells: by names and shapes, by what it notes, and by its family."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from apt_dense.option_checks import pair
from apt_dense.weights.arguments_by_family import Family, family_of
from apt_dense.weights.arguments_from_shapes import (
    block_arguments,
    check_whole,
    frame_arguments,
    num_heads,
    position_arguments,
    window_arguments,
)
from apt_dense.weights.arguments_in_own_metadata import CHOICES, noted_options
from apt_dense.weights.convert import split_backbone, to_apt
from apt_dense.weights.find_backbone_weights import innermost, unwrap
from apt_dense.weights.formats import FORMATS, StateDict, detect_format
from apt_dense.weights.resize import Grid, noted_grid, source_grid

_EXAMPLES = {
    "window_size": "window_size=0 if all blocks attend over the image, otherwise the cells of a window",
    "window_block_indexes": "window_block_indexes, the blocks with windows",
}


class Told(NamedTuple):
    """What a checkpoint tells about its ViT.

    Args:
        arguments: keyword arguments of ``APTViT``.
        asks: the arguments that it does not tell, each with an example.
        title: what it is, for messages.
    """

    arguments: dict[str, Any]
    asks: dict[str, str]
    title: str


def arguments_of(
    content: Mapping, img_size: int | tuple[int, int] | None = None, grid: Grid | None = None, **options: Any
) -> dict[str, Any]:
    """Return the keyword arguments of ``APTViT`` that rebuild the model of a checkpoint.

    Args:
        content: of a checkpoint's file, or a state dict.
        img_size: pixels, or (H, W), that positions are resampled to; None keeps those of the checkpoint.
        grid: rows and columns of the checkpoint's positions, where they are not a square.
        **options: arguments that take the place of what the checkpoint tells. With another ``patch_size`` and no
            ``img_size``, the number of patches stays.

    Raises:
        ValueError: if the checkpoint is not a whole backbone, or does not tell an argument that ``options`` leaves
            out, naming it.
    """
    told = told_by(unwrap(content), innermost(content), grid)
    # Without windows there are no blocks with them.
    given = {*options, *(["window_block_indexes"] if options.get("window_size") == 0 else [])}
    missing = [name for name in told.asks if name not in given]
    if missing:
        raise ValueError(
            f"the weights are those of {told.title}, whose names and shapes do not tell {_listed(missing)}. Add "
            f"{', '.join(told.asks[name] for name in missing)}; or name a model of timm's instead: "
            f"APTViT.from_timm(NAME, pretrained=FILE)"
        )
    arguments = {**told.arguments, **options}
    return {**arguments, **_sizes(told.arguments, arguments["patch_size"], img_size), **options}


def architecture_of(content: Mapping, img_size: int | tuple[int, int] | None = None, **options: Any) -> dict[str, Any]:
    """:func:`arguments_of` a checkpoint, without the choices that a model of ours notes next to its weights: thresholds
    and outputs, which a config says or leaves at their defaults."""
    arguments = arguments_of(content, img_size, **options)
    return {name: value for name, value in arguments.items() if name in options or name not in CHOICES}


def grid_of(content: Mapping, grid: Grid | None = None) -> Grid | None:
    """Return rows and columns of a checkpoint's positions: ``grid``, those that it notes, or the square that they can
    be; None if it has no positions. Arguments and errors as for :func:`arguments_of`."""
    ours = to_apt(unwrap(content))
    return position_arguments(ours, source_grid(ours, grid, noted_grid(innermost(content))))[1]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def told_by(state: StateDict, content: Mapping | None = None, grid: Grid | None = None) -> Told:
    """Collect what a backbone's state dict, with the names of any project, tells about its model.

    Args:
        content: the state dict that torch's metadata are noted with, if it is another one.
        grid: as for :func:`arguments_of`.

    Raises:
        ValueError: if it is not a whole backbone, or the grid of its positions cannot be told.
    """
    content = state if content is None else content
    ours, format_ = to_apt(state), detect_format(state)
    backbone, others = split_backbone(ours)
    check_whole(backbone)
    shown = frame_arguments(backbone) | block_arguments(backbone)
    positions, grid = position_arguments(backbone, source_grid(ours, grid, noted_grid(content)))
    tables = {name: ours[name] for name in others}
    windows, whole = window_arguments(backbone, tables, positions["pretrain_use_cls_token"])
    heads = num_heads(ours, shown["embed_dim"])
    shown |= positions | (windows or {}) | ({} if heads is None else {"num_heads": heads})

    family = family_of(_features(shown, format_))
    noted = noted_options(content, "coarse_embed.zero.weight" in backbone)
    arguments = _of_family(family, shown) | noted | shown | _own_sizes(noted, shown["patch_size"], grid, whole)
    asks = {"num_heads": _example_of_heads(family, shown["embed_dim"]), **_asked(family, shown)}
    asks |= _EXAMPLES if windows is None else {}
    return Told(
        arguments, {name: text for name, text in asks.items() if name not in arguments}, _title(family, shown, format_)
    )


# ---- sizes


def _own_sizes(noted: Mapping[str, Any], patch_size: int, grid: Grid | None, whole: Grid | None) -> dict[str, Any]:
    """``img_size`` and ``pretrain_img_size`` of a checkpoint.

    Args:
        noted: noted options; their sizes, which need not be multiples of the patch size, are taken if they fit.
        grid: rows and columns of absolute positions.
        whole: those of the image that blocks attend over, where relative positions or tables show them.
    """
    shown = {"img_size": whole or grid, "pretrain_img_size": grid if whole and whole != grid else None}
    shown = {name: None if size is None else tuple(patch_size * n for n in size) for name, size in shown.items()}
    sizes = {name: noted.get(name) for name in shown}
    if all(_cells(sizes[name] or sizes["img_size"], patch_size) == _cells(shown[name] or shown["img_size"], patch_size)
           for name in shown):  # fmt: skip
        shown = sizes
    return {name: size for name, size in shown.items() if size is not None or name == "pretrain_img_size"}


def _cells(size: Any, patch_size: int) -> Grid | None:
    return None if size is None else tuple(n // patch_size for n in pair("img_size", size))


def _sizes(told: Mapping[str, Any], patch_size: int, img_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Sizes in pixels for patches of ``patch_size`` and, if it is given, for images of ``img_size``."""
    sizes = {name: told[name] for name in ("img_size", "pretrain_img_size") if told.get(name) is not None}
    if patch_size != told["patch_size"]:
        sizes = {name: tuple(patch_size * n for n in _cells(size, told["patch_size"])) for name, size in sizes.items()}
    return sizes if img_size is None else {**sizes, "img_size": img_size}


# ---- families


def _features(shown: Mapping[str, Any], format_: str) -> dict[str, Any]:
    """What families are told by."""
    return {
        **shown,
        "format": format_,
        "layer_scale": shown["init_values"] is not None,
        "registers": shown["reg_tokens"] > 0,
        "class_position": shown["pretrain_use_cls_token"],
    }


def _of_family(family: Family, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that all models of a family share."""
    shared = {"norm_eps": family.norm_eps, "rotary": family.rotary, "act_layer": None}
    return {name: value for name, value in shared.items() if name not in _asked(family, shown)}


def _asked(family: Family, shown: Mapping[str, Any]) -> dict[str, str]:
    """Arguments in which the models of a family differ, with examples. The activation of SwiGLUs is always SiLU."""
    return {name: text for name, text in family.asks.items() if name != "act_layer" or shown["mlp_layer"] == "mlp"}


def _example_of_heads(family: Family, width: int) -> str:
    if width not in family.usual_widths:
        return "num_heads"
    return f"num_heads={width // family.usual_head} (as published models of {width} channels have)"


def _title(family: Family, shown: Mapping[str, Any], format_: str) -> str:
    return (
        f"{family.title} ({shown['embed_dim']} channels, {shown['depth']} blocks, patches of {shown['patch_size']} "
        f"pixels; names of {FORMATS[format_].title})"
    )
