"""HTML from nested calls: all text is escaped unless it is HTML already, so that no name of a file becomes markup."""

from collections.abc import Iterable, Sequence
from html import escape

_EMPTY = {"img", "meta", "rect", "line", "polyline", "circle"}  # elements without content

TIMES, NOTHING = "\u00d7", "\u2013"  # as in "2.1 times", and where a table has no figure


class Markup(str):
    """Text that is HTML already."""


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Build an element. Children that are not :class:`Markup` are escaped.

        element("p", "a < b", class_="note")  # <p class="note">a &lt; b</p>

    Args:
        attributes: of the element; a trailing underscore is dropped, others become hyphens; None leaves one out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = "".join([name, *(f' {key}="{escape(str(value))}"' for key, value in given.items())])
    if name in _EMPTY:
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Put parts next to each other; those that are not :class:`Markup` are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts))


def printable(name: str) -> str:
    r"""Write what cannot be shown in a name as a code: control characters, marks that turn the direction of writing
    round, and bytes that are not UTF-8. "a\nb" -> "a\\u000ab"."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)


def table(name: str, caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """Build a table that can be read out: with a caption, and the first cell of each row as its heading.

    Args:
        name: its id in the page.
    """
    heads = [element("th", cell, scope="col") for cell in head]
    lines = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    parts = element("caption", caption), element("thead", element("tr", *heads)), element("tbody", *lines)
    return element(
        "div", element("table", *parts, id=name), style="overflow-x:auto", tabindex=0, role="group", aria_label=caption
    )


def folded(title: str, *content: object) -> Markup:
    """Build a part that opens on a click."""
    return element("details", element("summary", title), *content)


def percent(share: float) -> str:
    """Write a share: 0.598 -> "59.8 %"."""
    return f"{100 * share:.1f} %"
