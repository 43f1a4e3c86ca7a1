"""Read what a page shows: its tables by id, its pictures, its charts."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np


class Page(HTMLParser):
    """A page that has been read.

    ``tables`` holds the texts of the cells of each row, its heading included, by id; ``captions`` and ``heads`` are
    theirs. ``elements`` lists every element's name and attributes in order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.heads: dict[str, list[str]] = {}
        self.captions: dict[str, str] = {}
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._table = ""
        self._cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        if tag in ("img", "meta", "rect", "line", "polyline", "circle"):
            return
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self._table = given["id"]
            assert self._table not in self.tables, "an id twice"
            self.tables[self._table] = []
        elif tag == "tr":
            self._cells = []
        elif tag in ("th", "td"):
            self._cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} ends inside another element"
        if tag == "tr" and "thead" in self._open:
            self.heads[self._table] = self._cells
        elif tag == "tr":
            self.tables[self._table].append(self._cells)

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if self._open and self._open[-1] in ("th", "td"):
            self._cells[-1] += data
        elif self._open and self._open[-1] == "caption":
            self.captions[self._table] = data

    def named(self, tag: str, class_: str | None = None) -> list[dict[str, str]]:
        """The attributes of all elements of that name, and of that class."""
        return [a for name, a in self.elements if name == tag and class_ in (None, a.get("class"))]

    def pictures(self) -> list[np.ndarray]:
        """All pictures, decoded: (H, W, 3) uint8 RGB."""
        found = []
        for attributes in self.named("img"):
            data = base64.b64decode(re.fullmatch(r"data:image/(?:png|jpeg);base64,(.+)", attributes["src"])[1])
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            found.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        return found


def number(text: str) -> float:
    """The number that a text begins with: "59.8 %" -> 59.8."""
    return float(re.match(r"-?[\d.]+(?:e-?\d+)?", text)[0])
