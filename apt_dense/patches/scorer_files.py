"""Files of learned scorers, which ``tools/fit_scorer.py`` writes; nothing in them is run."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from apt_dense.patches.first_block_scores import FirstBlockScorer
from apt_dense.patches.learned_scores import LearnedScorer
from apt_dense.patches.scorer_layers import FixedScorer

SUFFIX = ".safetensors"
_KINDS = {kind.KIND: kind for kind in (LearnedScorer, FirstBlockScorer)}


def load_scorer(path: str | Path, padding: Sequence[float]) -> FixedScorer:
    """The scorer in a file. One that did not change is read once.

    Args:
        padding: RGB grey levels of a host's padding.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it holds anything else, or weights that are not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"scorer={str(path)!r}: there is no such file; tools/fit_scorer.py writes one")
    status = Path(path).stat()
    return _read(str(path), (status.st_mtime_ns, status.st_size), tuple(padding))


@lru_cache(maxsize=16)
def _read(path: str, stamp: tuple[int, int], padding: tuple[float, ...]) -> FixedScorer:
    """``stamp`` changes when the file does."""
    try:
        with safe_open(path, "pt") as file:
            note = _note((file.metadata() or {}).get("apt_dense"))
            # Copies: tensors are views of the mapped file, and would change with it.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()} if note else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"scorer={path!r} is damaged ({error}); recreate it with tools/fit_scorer.py") from None
    kind = next((_KINDS[name] for name, version in note.items() if name in _KINDS and version == 1), None)
    if kind is None:
        raise ValueError(f"scorer={path!r} is no learned scorer; expected a file of tools/fit_scorer.py")
    return kind.from_file(path, note, weights, padding)


def _note(text: str | None) -> Mapping[str, Any]:
    note = json.loads(text or "{}")
    return note if isinstance(note, dict) else {}


def as_bytes(scorer: FixedScorer) -> bytes:
    """The content of a scorer's file."""
    return save(scorer.weights, {"apt_dense": json.dumps(scorer.note())})
