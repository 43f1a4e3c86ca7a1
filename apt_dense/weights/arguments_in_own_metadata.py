"""Options that a backbone notes next to its own weights, in the metadata that torch keeps with a state dict.

They tell what names and shapes cannot: heads, activation, epsilon, rotary positions, windows, pixels, thresholds. What
names and shapes do tell is believed before them.
``torch.save`` keeps them, and so does ``files.write_checkpoint`` in .safetensors, which safetensors itself does not.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import Tensor, nn

from apt_dense.weights.resize import Grid, note_grid

#: Options that are not noted, since they concern only training or the machine.
NOT_NOTED = "drop_path_rate", "checkpoint_blocks", "attention_backend"
#: Choices of a user, which the weights do not depend on.
CHOICES = (
    "thresholds", "token_budget", "min_tokens", "keep_fine", "keep_coarse", "scorer", "drop_padding", "partial_patches",
    "out_indices", "norm_intermediates", "pos_antialias",
)  # fmt: skip
#: Options of earlier versions, and the values at which a model is the same without them.
REMOVED: dict[str, Any] = {"embed_parts": 0.0, "cell_offsets": False}
#: Options that a model without coarse patches has no use for.
_OF_COARSE_PATCHES = "thresholds", "token_budget", "min_tokens", "scorer"


def options_of(model: nn.Module) -> dict[str, Any]:
    """All options of an ``APTViT`` by name, as its constructor takes them."""
    groups = model.options, model.block_options, model.position_options, model.patches
    return {name: value for group in groups for name, value in group.given().items()}


def note_options(state: Mapping, prefix: str, model: nn.Module) -> None:
    """Note the options of the ``APTViT`` below ``prefix`` in the metadata of a state dict, as plain values."""
    if not hasattr(state, "_metadata"):
        return
    given = options_of(model).items()
    noted = plain_options({name: value for name, value in given if name not in NOT_NOTED and not callable(value)})
    metadata, key = state._metadata.copy(), prefix.removesuffix(".")
    metadata[key] = {**metadata.get(key, {}), "options": noted}
    state._metadata = metadata


def noted_options(state: Mapping, has_coarse: bool) -> dict[str, Any]:
    """Read what :func:`note_options` noted; nothing if two backbones noted different options.

    Args:
        has_coarse: whether the weights have parts for coarse patches.

    Raises:
        ValueError: for a model that needs an option which there is no longer.
    """
    metadata = getattr(state, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    found = [entry["options"] for entry in entries if isinstance(entry, Mapping) and "options" in entry]
    if not found or not isinstance(found[0], Mapping) or any(other != found[0] for other in found):
        return {}
    for name, neutral in REMOVED.items():
        if has_coarse and found[0].get(name, neutral) != neutral:
            raise ValueError(
                f"these weights are of a model with {name}={found[0][name]!r}, an option that was removed since it "
                f"gained nothing; train the model again without it, or use the version of apt_dense that saved it"
            )
    left_out = () if has_coarse else _OF_COARSE_PATCHES
    return {name: value for name, value in found[0].items() if name not in (*NOT_NOTED, *REMOVED, *left_out)}


def with_notes(state: Mapping[str, Tensor], prefix: str, source: Mapping, grid: Grid | None) -> dict[str, Tensor]:
    """Copy a state dict made of another one's weights, with the options that that one notes.

    Args:
        prefix: before the names of the backbone in ``state``.
        source: the state dict with the notes.
        grid: rows and columns of the positions in ``state``, if they are known.
    """
    noted, options = OrderedDict(state), noted_options(source, has_coarse=True)
    noted._metadata = {prefix.removesuffix("."): {"options": options}} if options else {}
    if grid is not None:
        note_grid(noted, prefix, grid)
    return noted


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as values that configs and the safe reader of checkpoints accept."""
    return {name: asdict(value) if is_dataclass(value) else value for name, value in options.items()}
