"""The rows of a comparison at equal tokens: the uniform model, forms of the adaptive one, a smaller image."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from evidence.model_forms import Form

UNIFORM, SMALLER = "uniform", "smaller image"


class Case(NamedTuple):
    """One row to be: a variant at an image size.

    Args:
        form: None for the uniform model.
        share: of the tokens that the uniform model has at ``size``; 1 for that model itself.
    """

    variant: str
    size: tuple[float, float]  # pixels, height and width; of detectors, factors of the photos' size, twice the same
    share: float = 1.0
    form: Form | None = None


def cases(sizes: Sequence[tuple[int, int]], shares: Sequence[float], forms: Sequence[Form]) -> Iterator[Case]:
    """List all rows, the uniform model of each size first."""
    for size in sizes:
        yield Case(UNIFORM, size)
        for share in shares:
            yield Case(SMALLER, size, share)
            yield from (Case(form.name, size, share, form) for form in forms)


def parse_size(text: str) -> tuple[int, int]:
    """Read "504x672" (height and width in pixels).

    Raises:
        ValueError: for anything else.
    """
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"size {text!r}: expected HEIGHTxWIDTH in pixels, such as 504x672")
    return int(height), int(width)


def square_size(text: str) -> tuple[int, int]:
    """Read "512", the longer side of photos of any shape, as (512, 512).

    Raises:
        ValueError: for anything else.
    """
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"size {text!r}: with --coco expected N, pixels of the photos' longer side, such as 512")
    return int(text), int(text)


def check_size(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: for sizes that are not whole patches, at which "tokens" would count parts of them.
    """
    if size[0] % patch_size or size[1] % patch_size:
        better = "x".join(str(max(1, round(n / patch_size)) * patch_size) for n in size)
        raise ValueError(f"size {size[0]}x{size[1]} is not a multiple of patches of {patch_size} pixels; try {better}")
    return size[0] // patch_size, size[1] // patch_size


def crossings(rows: Sequence[Mapping[str, Any]], measure: str) -> Iterator[str]:
    """Say for each size and form at which shares of tokens it is ahead of the smaller image.

    Between two shares the difference is taken to be linear. (Tokens of the two differ by a fraction of a per cent.)
    """
    for size in dict.fromkeys(row["size"] for row in rows):
        here = [row for row in rows if row["size"] == size]
        rival = {row["share"]: row[measure] for row in here if row["variant"] == SMALLER}
        if not rival:
            continue
        for form in dict.fromkeys(row["variant"] for row in here if row["variant"] not in (UNIFORM, SMALLER)):
            lead = sorted((row["share"], row[measure] - rival[row["share"]]) for row in here if row["variant"] == form)
            yield f"At {size} {form} is {_where_ahead(lead)}"


def _where_ahead(lead: Sequence[tuple[float, float]]) -> str:
    """Describe the leads (share, difference), ascending by share."""
    if all(difference > 0 for _, difference in lead):
        return "ahead of the smaller image at all shares"
    if all(difference <= 0 for _, difference in lead):
        return "ahead of the smaller image at no share"
    places = []
    for (low, before), (high, after) in pairwise(lead):
        if (before > 0) != (after > 0):
            place = low + (high - low) * before / (before - after)
            places.append(f"{'above' if after > 0 else 'below'} about {place:.0%} of the tokens")
    return f"ahead of the smaller image {' and '.join(places)}"
