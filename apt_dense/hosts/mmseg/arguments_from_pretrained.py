"""Where the weights of a backbone's config come from, and the arguments that they tell."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from apt_dense.hosts.mmseg.read_init_cfg import Pretrained, split_init_cfg, with_resized_patches
from apt_dense.hosts.mmseg.safe_checkpoints import read_address
from apt_dense.weights.arguments_from_file import architecture_of
from apt_dense.weights.arguments_in_own_metadata import plain_options
from apt_dense.weights.files import CheckpointError
from apt_dense.weights.find_backbone_weights import innermost, unwrap
from apt_dense.weights.timm_arguments import apt_arguments, timm_model_without_weights

#: An address of timm's weights begins with this.
TIMM = "timm://"
#: A config with one of these says what its backbone is; without, its weights do.
SAY_IT_ALL = "embed_dim", "depth"
#: What a config has next to the options of the ViT.
_NOT_OF_THE_VIT = "type", "pretrained", "init_cfg", "frozen_stages", "with_cp", "norm_eval"


def pretrained_config(pretrained: str | None, init_cfg: Any) -> Any:
    """MMEngine's initialisation config, of which ``pretrained`` is a short form."""
    return init_cfg if pretrained is None else {"type": "Pretrained", "checkpoint": pretrained}


def fill_in(options: Mapping[str, Any], init_cfg: Any) -> tuple[dict[str, Any], Any]:
    """Complete the arguments of a backbone, and its initialisation config, by what its weights tell.

    Only where weights are named and the arguments say neither width nor depth. An argument that is given stays; a
    ``patch_size`` that is given asks for patches to be resampled.

    Raises:
        TypeError, ValueError: as :func:`split_init_cfg`.
        CheckpointError: if the weights cannot be read, or do not tell an argument that is not given, naming it.
    """
    options, source = dict(options), split_init_cfg(init_cfg)[0]
    if source is None or not options.keys().isdisjoint(SAY_IT_ALL):
        return options, init_cfg
    if "patch_size" in options:
        init_cfg = with_resized_patches(init_cfg)
    return _arguments(source, options), init_cfg


def _arguments(source: Pretrained, options: dict[str, Any]) -> dict[str, Any]:
    size, address = options.pop("img_size", None), source.checkpoint
    if address.startswith(TIMM):
        patch_size = options.get("patch_size")
        model = timm_model_without_weights(address.removeprefix(TIMM), img_size=size, patch_size=patch_size)
        return {**apt_arguments(model), **options}
    try:
        return architecture_of(read_weights(source), size, grid=source.options.get("grid"), **options)
    except ValueError as error:
        raise CheckpointError(f"{address}: {error}") from error


def read_weights(source: Pretrained) -> Mapping:
    """Read a checkpoint from a file or an address, and take out what its ``prefix`` names."""
    content = read_address(source.checkpoint)
    if not source.prefix:
        return content
    return _below(content, source.prefix.rstrip(".") + ".")


def _below(content: Mapping, prefix: str) -> Mapping:
    """The weights below ``prefix``, without it, and what is noted there."""
    state = unwrap(content, backbone=False)
    found = OrderedDict((name.removeprefix(prefix), v) for name, v in state.items() if name.startswith(prefix))
    if not found:
        raise ValueError(f"no weight of the checkpoint starts with prefix={prefix!r}; it holds {list(state)[:4]}, ...")
    notes = getattr(innermost(content), "_metadata", None)
    entries = notes.items() if isinstance(notes, Mapping) else ()
    inside = [(name.removeprefix("module."), entry) for name, entry in entries if isinstance(name, str)]
    found._metadata = {name[len(prefix) :]: entry for name, entry in inside if f"{name}.".startswith(prefix)}
    return found


def fill_in_config(cfg: Config, checkpoint: str | None = None) -> None:
    """Write into a config what the weights of its backbone tell, so that it is complete without them.

    Args:
        checkpoint: of a run with this config, which tells it where the backbone's own weights cannot be read.

    Raises:
        FileNotFoundError, CheckpointError: as :func:`fill_in`.
    """
    model = cfg.get("model") or {}
    backbone = model.get("backbone") or {}
    if str(backbone.get("type")).rpartition(".")[2] != "APTViT":
        return
    source = backbone.get("pretrained") or model.get("pretrained")
    init_cfg = pretrained_config(source, backbone.get("init_cfg"))
    given = {name: value for name, value in backbone.items() if name not in _NOT_OF_THE_VIT}
    try:
        options, init_cfg = fill_in(given, init_cfg)
    except (OSError, CheckpointError):
        if checkpoint is None:
            raise
        options, _ = fill_in(given, pretrained_config(checkpoint, None))
    if options.keys() == given.keys():
        return
    for part in (model, backbone):
        part.pop("pretrained", None)
    backbone.update(plain_options(options), init_cfg=init_cfg)
