"""Forms of an adaptive model: what is compared, by name."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apt_dense import APTViT, PatchSelector
from apt_dense.option_checks import names_of
from apt_dense.options import BlockOptions, ModelOptions, PatchOptions, PositionOptions

PLAIN = "adaptive"
_KNOWN = names_of(ModelOptions, BlockOptions, PositionOptions, PatchOptions)


class Form(NamedTuple):
    """A name, and the options of ``APTViT`` that make this form out of the model."""

    name: str
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The form as :func:`parse_form` reads it."""
        return ": ".join(filter(None, [self.name, ", ".join(f"{k}={v!r}" for k, v in self.options.items())]))


def parse_form(text: str) -> Form:
    """Read "NAME" or "NAME: OPTION=VALUE, ..." with values as Python writes them.

    "half: proportional_attention=0.5, scorer='laplacian', thresholds=(0.15,)" is an example.

    Raises:
        ValueError: if it does not read like that, or names an option that ``APTViT`` does not have.
    """
    name, _, given = text.partition(":")
    wrong = ValueError(f"form {text!r}: expected NAME or NAME: OPTION=VALUE, ..., values as Python writes them")
    try:
        call = ast.parse(f"dict({given.strip()})", mode="eval").body
        options = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise wrong from None
    if not name.strip() or call.args or None in options:
        raise wrong
    unknown = sorted(options.keys() - set(_KNOWN))
    if unknown:
        raise ValueError(f"form {text!r}: APTViT has no option {', '.join(unknown)}; see apt_dense/options.py")
    return Form(name.strip(), options)


def check_names(forms: Sequence[Form]) -> None:
    """Raise a ValueError for two forms of one name."""
    names = [form.name for form in forms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several forms are called {', '.join(twice)}; give each a name of its own")


def with_thresholds(selector: PatchSelector, thresholds: Sequence[float]) -> PatchSelector:
    """The same choice of patches by other thresholds; () for the uniform model."""
    return replace(selector, thresholds=tuple(thresholds), token_budget=None)


def set_thresholds(model: APTViT, thresholds: Sequence[float]) -> None:
    """Let a model cut images by other thresholds; see :func:`with_thresholds`."""
    model.set_patches(thresholds=tuple(thresholds), token_budget=None)
