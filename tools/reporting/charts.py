"""Charts of a page as inline SVG: 400 units wide, so that their text can be read on a phone.

Colours come from the page's style; each chart has a text for those who do not see it.
"""

from collections.abc import Sequence

from apt_dense.drawing import scale_colour

from reporting.html_elements import Markup, element, percent

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 390, 24, 168  # of the area inside the axes
_HEIGHT = 205


def _chart(described: str, *parts: Markup, height: int = _HEIGHT) -> Markup:
    return element(
        "svg",
        element("title", described),
        *parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=described,
        class_="chart",
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", class_: str | None = None) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def _x(share: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * share


def _y(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * share


def _frame(below: str) -> list[Markup]:
    """The axis of shares of tokens, from 0 to 100 %."""
    ticks = [
        _text(_x(tick / 100), _BOTTOM + 15, f"{tick} %", "end" if tick == 100 else "middle")
        for tick in range(0, 101, 20)
    ]
    return [_line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"), *ticks, _text(_x(0.5), _BOTTOM + 32, below)]


def histogram(counts: Sequence[int], mean: float) -> Markup:
    """Draw how many photos keep which share of their tokens: counts in equal intervals of [0, 1]."""
    most = max(*counts, 1)
    width = (_RIGHT - _LEFT) / len(counts)
    bars = [
        element(
            "rect",
            x=f"{_LEFT + number * width + 0.75:.2f}",
            y=f"{_y(count / most):.2f}",
            width=f"{width - 1.5:.2f}",
            height=f"{_BOTTOM - _y(count / most):.2f}",
            class_="bar",
        )
        for number, count in enumerate(counts)
        if count
    ]
    scale = [_text(_LEFT - 5, _TOP + 4, str(most), "end"), _text(_LEFT - 5, _BOTTOM, "0", "end")]
    anchor = "end" if mean > 0.7 else "start"
    label = _text(_x(mean) + (-4 if anchor == "end" else 4), _TOP - 8, f"mean {percent(mean)}", anchor, "mark-text")
    middle = [_line(_x(mean), _TOP - 18, _x(mean), _BOTTOM, "mark"), label]
    said = f"Histogram: photos by the share of tokens they keep; the mean is {percent(mean)}. The table has the counts."
    return _chart(said, *bars, *_frame("tokens kept"), *scale, *middle)


def sizes(names: Sequence[str], areas: Sequence[float], tokens: Sequence[float]) -> Markup:
    """Draw which share of the tokens, and of the area, each size of patches has: two bars."""
    rows = [_stack(34 + 62 * row, title, shares) for row, (title, shares) in enumerate(
        (("of the image", areas), ("of the tokens", tokens)))]  # fmt: skip
    said = "; ".join(
        f"{name}: {percent(area)} of the image, {percent(token)} of the tokens"
        for name, area, token in zip(names, areas, tokens, strict=True)
    )
    return _chart(f"Patches by size. {said}", *rows, height=140)


def _stack(top: int, title: str, shares: Sequence[float]) -> Markup:
    """A bar as wide as the chart, cut by shares, in the colours in which patches are drawn."""
    parts, left = [_text(5, top - 8, title, "start")], 5.0
    for scale, share in enumerate(shares):
        width = share * (WIDTH - 10)
        red, green, blue = scale_colour(scale)
        fill = "var(--fine)" if scale == 0 else f"rgb({red},{green},{blue})"
        parts.append(
            element(
                "rect", x=f"{left:.2f}", y=top, width=f"{width:.2f}", height=30, style=f"fill:{fill}", class_="part"
            )
        )
        if share > 0.11:
            parts.append(_text(left + width / 2, top + 20, f"{100 * share:.0f} %", class_="on-bar"))
        left += width
    return element("g", *parts)


def curve(factors: Sequence[float], shares: Sequence[float]) -> Markup:
    """Draw the mean share of tokens against the factor of the thresholds, 1 in the middle, on a logarithmic axis."""
    places = [_x(number / (len(factors) - 1)) for number in range(len(factors))]
    points = " ".join(f"{x:.1f},{_y(share):.1f}" for x, share in zip(places, shares, strict=True))
    dots = [element("circle", cx=f"{x:.1f}", cy=f"{_y(share):.1f}", r=3, class_="dot")
            for x, share in zip(places, shares, strict=True)]  # fmt: skip
    ticks = [_text(x, _BOTTOM + 15, f"{factor:.2g}") for x, factor in list(zip(places, factors, strict=True))[::2]]
    grid = [_line(_LEFT, _y(tick / 4), _RIGHT, _y(tick / 4), "axis" if tick == 0 else "grid") for tick in range(5)]
    scale = [_text(_LEFT - 4, _y(tick / 4) + 4, f"{25 * tick}", "end") for tick in range(5)]
    names = _text(2, _TOP - 10, "% of the tokens", "start"), _text(_x(0.5), _BOTTOM + 32, "thresholds times")
    now = _line(_x(0.5), _TOP, _x(0.5), _BOTTOM, "mark")
    said = "Curve: the mean share of tokens falls as all thresholds are raised. The table has the figures."
    drawn = element("polyline", points=points, class_="curve")
    return _chart(said, *grid, now, drawn, *dots, *ticks, *scale, *names)
