"""Read the config.yaml of a Detectron2 run and build its model, without running what the file says.

Detectron2's own reader makes any Python object that a file describes, and ``instantiate`` calls whatever ``_target_``
names. Here, objects that are not known are left as their names, and only classes of Detectron2, torch and this package
are built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

#: Where classes may come from. Their own module counts, not the one that a file finds them in.
_MODULES = "detectron2.modeling.", "detectron2.layers.", "apt_dense.hosts.detectron2.", "torch.nn.modules."
_TAG = "tag:yaml.org,2002:python/"


class _Reader(yaml.SafeLoader):
    """A loader of plain values that describes Python objects instead of making them."""


def _tuple(loader: _Reader, node: yaml.Node) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


def _name(loader: _Reader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    return {"_name_": suffix}


def _object(loader: _Reader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    """An object with its fields, such as Detectron2's ShapeSpec."""
    fields = loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else {}
    return {"_target_": suffix, **{str(key): value for key, value in fields.items()}}


def _applied(loader: _Reader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    """A call; that of ``functools.partial`` as it is pickled, with (function, arguments, keywords, fields)."""
    content = loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else {}
    state = content.get("state")
    if suffix != "functools.partial" or not isinstance(state, tuple) or len(state) != 4 or state[1]:
        return {"_target_": suffix}
    return {"_partial_": state[0], "keywords": state[2]}


_Reader.add_constructor(f"{_TAG}tuple", _tuple)
_Reader.add_multi_constructor(f"{_TAG}name:", _name)
_Reader.add_multi_constructor(f"{_TAG}object:", _object)
_Reader.add_multi_constructor(f"{_TAG}object/apply:", _applied)
_Reader.add_multi_constructor(_TAG, lambda loader, suffix, node: {"_name_": suffix})


def read_run_config(path: Path) -> dict[str, Any]:
    """Read a config.yaml, of a lazy or a yacs config, as plain values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or holds no config.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Detectron2's default_setup and tools/train_det.py write it; for another run of a "
            f"yacs config, call apt_dense.hosts.detectron2.save_run_config(cfg)"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Reader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the config of a Detectron2 run: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model", content.get("MODEL")), dict):
        raise ValueError(f"{path} is not the config of a Detectron2 run: it has no model")
    return content


def resolved(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Replace the references between the parts of a lazy config, such as ``${..num_classes}``, in its model and data.

    Raises:
        ValueError: for a reference to nothing.
    """
    try:
        tree = OmegaConf.create(dict(config))
        parts = {name: tree.get(name) for name in ("model", "dataloader")}
        return {name: OmegaConf.to_container(part, resolve=True) for name, part in parts.items() if part is not None}
    except Exception as error:  # OmegaConf's are of many kinds
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def build(node: Any, path: Path) -> Any:
    """Build what a resolved lazy config describes, as Detectron2's ``instantiate``, from known classes alone.

    Args:
        path: of the file, for errors.

    Raises:
        ValueError: for anything else than a class of Detectron2's models, of torch.nn and of this package, and for
            arguments that do not fit.
    """
    if isinstance(node, list | tuple):
        return type(node)(build(child, path) for child in node)
    if not isinstance(node, Mapping):
        return node
    if "_name_" in node:
        return _find(node["_name_"], path)
    if "_partial_" in node:
        return partial(build(node["_partial_"], path), **build(node["keywords"], path))
    arguments = {key: build(value, path) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    kind = node["_target_"]
    kind = build(kind, path) if isinstance(kind, Mapping) else _find(kind, path)
    try:
        return kind(**arguments)
    except Exception as error:  # of whatever class the file names
        raise ValueError(f"{path}: {kind.__name__} cannot be built: {' '.join(str(error).split())}") from error


def _find(name: Any, path: Path) -> type:
    """Find an allowed class by its full name. Nothing but Detectron2's and this package's modules is imported."""
    module, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    found = None
    if f"{module}.".startswith(_MODULES):
        try:
            found = vars(importlib.import_module(module)).get(attribute)
        except ImportError:
            found = None
    if inspect.isclass(found) and f"{found.__module__}.".startswith(_MODULES):
        return found
    raise ValueError(
        f"{path} asks for {name!r}; of a run's config, only the classes of detectron2.modeling, detectron2.layers, "
        f"torch.nn and apt_dense.hosts.detectron2 are built. To use a config file that you trust, name it as "
        f"config=FILE (--config)"
    )


def find_all(node: Any, target: str) -> Sequence[dict[str, Any]]:
    """List the parts of a config whose ``_target_`` ends in a class's name."""
    if isinstance(node, list | tuple):
        return [found for child in node for found in find_all(child, target)]
    if not isinstance(node, Mapping):
        return []
    own = [dict(node)] if str(node.get("_target_")).rpartition(".")[2] == target else []
    return [*own, *find_all(list(node.values()), target)]
