"""Reduce the config of a model or a pipeline that came with a checkpoint to types that are safe to build.

MMEngine imports whatever a ``type`` names: ``type="os.system"`` runs a command, and ``type="name"`` the file name.py. A
run's config may come from anywhere, so its types are only looked up among those that are registered already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mmcv.transforms  # noqa: F401 (registers Resize and Normalize)
from mmseg.registry import MODELS, TRANSFORMS
from mmseg.utils import register_all_modules

#: Where OpenMMLab's types may come from. Its other backbones and encoders read the files that their arguments name.
_MODULES = (
    "mmseg.models.decode_heads", "mmseg.models.necks", "mmseg.models.losses", "mmseg.models.segmentors",
    "mmseg.models.data_preprocessor", "mmcv.cnn", "mmengine.model", "mmengine.utils.dl_utils",
)  # fmt: skip
#: What only matters for training, or names further files.
_UNUSED = {"init_cfg", "pretrained", "class_weight", "train_cfg", "sampler"}
#: Steps of a test pipeline that read a file or its labels, in place of which a photo is put in.
_READING = {
    "LoadImageFromFile",
    "APTLoadImage",
    "LoadImageFromNDArray",
    "LoadAnnotations",
    "APTLoadAnnotations",
    "APTLoadLabels",
    "CheckLabels",
}
#: Steps that change a picture. After Pad and CenterCrop, the prediction would be stretched over the whole of it.
_STEPS = {
    "Resize", "ResizeToMultiple", "ResizeShortestEdge", "Normalize", "Rerange", "CLAHE", "RGB2Gray", "AdjustGamma",
    "PackSegInputs",
}  # fmt: skip


def trusted_model(config: Any, source: str) -> dict[str, Any]:
    """Copy a model's config with the names of registered types, without what a test does not need.

    Types of the user's own packages are accepted once the user has imported them.

    Args:
        config: the config of an MMSegmentation model around an APTViT.
        source: how errors name it.

    Raises:
        ValueError: if it is not the config of such a model, or names a type that is not registered or not allowed.
    """
    register_all_modules(init_default_scope=False)
    if not isinstance(config, Mapping) or not isinstance(config.get("backbone"), Mapping):
        raise ValueError(f"{source} has no model with a backbone")
    trusted = _copy(config, source)
    if trusted["backbone"].get("type") != "APTViT":
        raise ValueError(f"{source}: its backbone is {trusted['backbone'].get('type')}, expected APTViT")
    return trusted


def _copy(node: Any, source: str) -> Any:
    if isinstance(node, list | tuple):
        return type(node)(_copy(child, source) for child in node)
    if not isinstance(node, Mapping):
        return node
    hidden = [key for key in node if not isinstance(key, str) or key.startswith("_")]
    if hidden:
        raise ValueError(f"{source} has the key {hidden[0]!r}, which MMEngine would act on; take it out")
    copied = {key: _copy(value, source) for key, value in node.items() if key not in _UNUSED and key != "type"}
    return {"type": _registered(node["type"], source)} | copied if "type" in node else copied


def _registered(kind: Any, source: str) -> str:
    """Return the name under which a type is registered, without the package that dumped configs may put before it."""
    name = kind.rpartition(".")[2] if isinstance(kind, str) else ""
    found = next((registry.module_dict[name] for registry in _registries() if name in registry.module_dict), None)
    module = getattr(found, "__module__", "")
    if found is None:
        raise ValueError(
            f"{source} names the type {kind!r}, which is not registered; import the package that registers it before "
            f"loading the model"
        )
    if module.startswith("mm") and not module.startswith(_MODULES):
        raise ValueError(f"{source} names the type {kind!r} of {module}, which is not built from a run's config")
    return name


def _registries() -> Iterator[Any]:
    registry = MODELS
    while registry is not None:
        yield registry
        registry = registry.parent


def trusted_steps(pipeline: Sequence[Any], source: str) -> list[Any]:
    """Build the steps of a test pipeline that follow the reading of a picture.

    Raises:
        ValueError: for a step of another kind than changing pictures.
    """
    steps = []
    for step in pipeline:
        name = str(step.get("type") if isinstance(step, Mapping) else step).rpartition(".")[2]
        if name in _READING:
            continue
        if name not in _STEPS:
            raise ValueError(
                f"{source}: its test pipeline has {name}, which photos cannot be put through; test it with eval_seg"
            )
        steps.append(TRANSFORMS.build({**step, "type": name}))
    return steps
