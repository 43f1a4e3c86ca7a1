"""A digest of the content of files, by which results are found again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from apt_dense.patches.scorer_files import SUFFIX


def digest(paths: Sequence[Path]) -> str:
    """Tell apart the content of files, and their order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def scorer_digest(value: object) -> str | None:
    """Return the digest of the scorer file that an option names, whose content may change under the same name; None for
    any other value."""
    return digest([Path(value)]) if isinstance(value, str) and value.endswith(SUFFIX) else None
