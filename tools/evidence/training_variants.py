"""Variants of a training, by name: the patches, the size of the images, and the weights it starts from."""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evidence.model_forms import parse_form
from evidence.rival_backbones import RANDOM, RIVALS

OWN = "size", "tokens", "start", "epochs", "rate", "rival"


class Variant(NamedTuple):
    """One row of the comparison.

    Args:
        name: of the row.
        options: of ``APTViT``; "thresholds" are ratios where ``tokens`` is given.
        size: pixels (H, W) of the images; None for that of the command.
        tokens: tokens of an image on average, as a share of those of the uniform model at the command's size;
            thresholds are scaled to keep it. None for the uniform model.
        start: the row whose trained weights this one starts from; None for the pretrained ones.
        epochs: of training, perhaps a part of one; None for those of the command. With ``start``, 0 tests its weights
            as they are.
        rate: of learning, as a share of the command's, but of what only APT has, which is new.
        rival: another way to that share of tokens than adaptive patches: "merging" of similar tokens, "pruning" with a
            way back, or patches merged at "random" (``rival_backbones``).
    """

    name: str
    options: Mapping[str, Any]
    size: tuple[int, int] | None = None
    tokens: float | None = None
    start: str | None = None
    epochs: float | None = None
    rate: float = 1.0
    rival: str | None = None

    @property
    def is_adaptive(self) -> bool:
        return self.tokens is not None and self.rival not in RIVALS


def parse_variant(text: str) -> Variant:
    """Read "NAME: tokens=0.6, size=(504, 658), proportional_attention=0.5", in any order.

    Raises:
        ValueError: for anything else, and for values out of range.
    """
    name, _, given = text.partition(":")
    own, others = _split(text, given)
    form = parse_form(f"{name}: {others}" if others else name)
    variant = Variant(form.name, form.options, **own)
    for field, is_right, expected in (
        ("size", variant.size is None or _is_size(variant.size), "two numbers of pixels"),
        ("tokens", variant.tokens is None or _is_positive(variant.tokens), "a number above 0"),
        (
            "epochs",
            variant.epochs is None
            or (type(variant.epochs) is int and variant.epochs == 0)
            or _is_positive(variant.epochs),
            "0 or more",
        ),
        ("rate", _is_positive(variant.rate), "a number above 0"),
        ("start", variant.start is None or isinstance(variant.start, str), "the name of a row"),
        ("rival", variant.rival in (None, RANDOM, *RIVALS), f"one of {', '.join((RANDOM, *RIVALS))}"),
        ("tokens", variant.rival is None or variant.tokens is not None, "a share of tokens, as there is a rival"),
        ("rival", variant.rival is None or "scorer" not in variant.options, "None where a scorer is given"),
    ):
        if not is_right:
            raise ValueError(f"row {text!r}: {field}={getattr(variant, field)!r}, expected {expected}")
    return variant


def _split(text: str, given: str) -> tuple[dict[str, Any], str]:
    """Take the fields of :class:`Variant` out of the options of a form."""
    try:
        call = ast.parse(f"dict({given.strip()})", mode="eval").body
        words = [*call.args, *call.keywords]
        own = {word.arg: ast.literal_eval(word.value) for word in words if word.arg in OWN}
        others = ", ".join(ast.unparse(word) for word in words if word.arg not in OWN)
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(
            f"row {text!r}: expected NAME or NAME: OPTION=VALUE, ..., values as Python writes them"
        ) from None
    return own, others


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _is_positive(value: object, or_zero: bool = False) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf and (or_zero or value > 0)


def in_order(variants: Sequence[Variant]) -> list[Variant]:
    """The variants as they are listed.

    Raises:
        ValueError: for two of one name, or one that starts from a row that does not stand before it.
    """
    before: set[str] = set()
    for variant in variants:
        if variant.name in before:
            raise ValueError(f"several rows are called {variant.name!r}; give each a name of its own")
        if variant.start is not None and variant.start not in before:
            raise ValueError(f"row {variant.name!r} starts from {variant.start!r}; list that row before it")
        before.add(variant.name)
    return list(variants)
