"""Errors that end a run in one line: which part of the config failed, and the file that has the full traceback.

Many mistakes in configs show only in the first batch or forward pass, deep inside of a host: a head for other channels
than the backbone's, an image size that the data lack. The traceback leads to the host's code, not to the config.
"""

import ast
import linecache
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

LOG = "errors.log"  # in the folder of a run; later errors are added to it

_WORKER_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in ')
#: Keys of parts whose type configs may leave out.
_DEFAULTS = {"OptimWrapper": "optim_wrapper", "AmpOptimWrapper": "optim_wrapper"}
_DEFAULTS |= {"build_resumable_loader": "dataloader.train", "APTCheckpointHook": "default_hooks"}
_INSTANTIATE = "detectron2.config.instantiate"
_MOST = 300  # characters of an error's own message


class RunError(RuntimeError):
    """A run failed, for a mistake in its config or one in the code. Tools report it in one line."""


class Place(NamedTuple):
    """Where an error was raised.

    Args:
        key: of the config's part, such as "model.decode_head"; empty if none is known.
        module: name of the module inside of the model; empty if none ran.
    """

    key: str = ""
    module: str = ""

    def __str__(self) -> str:
        inside = f"the model's {self.module}" if self.module else ""
        if not self.key:
            return inside or "the run"
        deeper = inside and self.key.replace("[", ".").replace("]", "") != f"model.{self.module}"
        return f"{self.key} in the config" + (f" ({inside})" if deeper else "")


@contextmanager
def explaining_errors(
    folder: str | Path,
    config: Mapping | None = None,
    expected: tuple[type[Exception], ...] = (),
    advice: Callable[[Exception], str] = lambda error: "",
) -> Iterator[None]:
    """Turn an error of the code inside into a :class:`RunError` that names the part of the config, and write its
    traceback to a file in the run's folder.

    Args:
        folder: gets ``LOG``.
        config: dictionaries and lists; parts are told by their "type" or "_target_". None if there is no config.
        expected: errors that say already what to do; they stay, and so does whatever is no Exception. OSErrors, of
            which most name a file, stay as well.
        advice: what else may be wrong, for the end of the line.

    Raises:
        RunError: for every other error.
    """
    try:
        yield
    except (*expected, RunError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not _of_worker(error):
            raise
        where, why = place_of(error, config or {}), reason(error)
        more = advice(error)
        log = _write(error, Path(folder) / LOG)
        told = f"the full traceback is in {log}" if log else "no traceback could be written"
        raise RunError(f"{where} failed: {why}{more and '; '}{more}; {told}") from error


def _write(error: Exception, path: Path) -> Path | None:
    """Add the traceback to a file; None if that fails, which must not hide the error."""
    text = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}\n{text}\n")
    except OSError:
        return None
    return path


# ---- what was said --------------------------------------------------------------------------------------------------


def _of_worker(error: BaseException) -> bool:
    """Tell whether torch has put the traceback of a data worker into the message."""
    return "in DataLoader worker process" in str(error)


def reason(error: Exception) -> str:
    """The kind and the start of an error's message in one line, also of one that a data worker raised."""
    if _of_worker(error):
        lines = str(error).strip().splitlines()
        last_frame = max((number for number, line in enumerate(lines) if line.startswith("  ")), default=-1)
        return " ".join(" ".join(lines[last_frame + 1 :]).split())[:_MOST]
    words = error.args[0] if isinstance(error, KeyError) and error.args else error
    said = " ".join(str(words).split())[:_MOST] or _failed_line(error)
    return f"{type(error).__name__}: {said}".strip(": ")


def _failed_line(error: Exception) -> str:
    """The source line that raised an error, for asserts without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return " ".join(linecache.getline(frames[-1].filename, frames[-1].lineno).split()) if frames else ""


# ---- where it failed ------------------------------------------------------------------------------------------------


def place_of(error: Exception, config: Mapping) -> Place:
    """Find the innermost part of a config whose code an error came through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames]
    root = next((owner for owner in owners if isinstance(owner, nn.Module)), None)
    names = {} if root is None else {id(module): _bare(name) for name, module in root.named_modules()}
    module = next((name for owner in reversed(owners) if (name := names.get(id(owner)))), "")
    if _of_worker(error):
        keys = (_key_of_class(config, name) for name in _classes_of_worker(str(error)))
        return Place(next(filter(None, keys), ""))
    if key := _key_built(frames, config):
        return Place(key)
    for owner in reversed(owners):
        key = _key_of_module(config, names.get(id(owner), ""))
        if owner is not None and not key:
            inside = _key_of_module(config, module)
            name = type(owner).__name__
            key = "model" if owner is root and "model" in config else _key_of_class(config, name, inside)
        if key:
            return Place(key, module)
    return Place("", module)


def _bare(name: str) -> str:
    """The name of a module without those that wrap the model, for several processes or test-time augmentation."""
    return re.sub(r"^(module(\.|$))+", "", name)


def _key_built(frames: Sequence[FrameType], config: Mapping) -> str:
    """The key of the part that Detectron2's ``instantiate`` was building; "" if nothing was built."""
    local = [frame.f_locals for frame in frames if frame.f_globals.get("__name__") == _INSTANTIATE]
    nodes = [names["v"] for names in local if hasattr(names.get("v"), "_get_full_key")]
    built = [str(names["cls_name"]).rpartition(".")[2] for names in local if "cls_name" in names]
    key = nodes[-1]._get_full_key(None) if nodes else ""
    by_class = _key_of_class(config, built[-1]) if built and (not nodes or hasattr(nodes[-1], "append")) else ""
    return by_class or key


def _key_of_module(config: Mapping, name: str) -> str:
    """The deepest part of the config's model that a module's name leads to; "" if none."""
    node, key = config.get("model"), ""
    while isinstance(node, Mapping) and isinstance(node.get("module"), Mapping):  # inside of a wrapper
        node = node["module"]
    for part in name.split("."):
        if isinstance(node, Mapping) and isinstance(node.get(part), Mapping | list | tuple):
            node, key = node[part], f"{key}.{part}"
        elif isinstance(node, list | tuple) and part.isdecimal() and int(part) < len(node):
            node, key = node[int(part)], f"{key}[{part}]"
        else:
            break
    return key and f"model{key}"


def _key_of_class(config: Mapping, name: str, inside: str = "") -> str:
    """The key of the first part of a config whose type has this name, ``inside`` of another if there is one, without
    its number in a list, of which hosts lengthen some; "" if there is none."""
    keys = [*find_parts(config, partial(_is_of_class, name)), _DEFAULTS.get(name, "")]
    key = next((key for key in keys if inside and key.startswith(inside)), keys[0])
    return f"{name} of {key.rpartition('[')[0]}" if key.endswith("]") else key


def _is_of_class(name: str, part: Any) -> bool:
    kind = (part.get("type") or part.get("_target_")) if isinstance(part, Mapping) else None
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2] == name


def find_parts(node: Any, matches: Callable[[Any], bool], key: str = "") -> Iterator[str]:
    """Find the keys of the parts of a config that match, the outermost first."""
    if key and matches(node):
        yield key
    own = isinstance(node, Mapping) and node.get("type") == "SeededDataset"  # put around the user's data set
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for name, child in items:
        path = key if own and name == "dataset" else f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}"
        yield from find_parts(child, matches, path.removeprefix("."))


def _classes_of_worker(text: str) -> Iterator[str]:
    """The classes whose methods a worker's traceback names, the innermost first."""
    for found in reversed(list(_WORKER_FRAME.finditer(text))):
        yield from _class_at(found["file"], int(found["line"]))


def _class_at(file: str, line: int) -> Iterator[str]:
    """The class of a source file that holds a line."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0):
            yield node.name
