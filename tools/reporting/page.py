"""The page of a report: one HTML file without scripts that loads nothing."""

from collections.abc import Sequence
from pathlib import Path

from calibration.token_curves import Source
from reporting.html_elements import TIMES, Markup, element, folded, join, percent, printable, table
from reporting.page_sections import (
    labels_section,
    photos_section,
    quality_section,
    section,
    speed_section,
    spread_section,
    thresholds_section,
)
from reporting.photo_card import size_names
from reporting.photo_figures import PhotoLeftOut
from reporting.report_content import Report, photos_of
from shared.patch_pictures import describe_choice

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is run, nothing is loaded
_STYLE = Path(__file__).with_name("page_style.css")


def build_page(report: Report) -> str:
    """Return the page as text."""
    title = f"Patches of {photos_of(len(report.photos))}: {percent(report.summary.share)} of the tokens kept"
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    ]
    parts = [
        _lead(report, title),
        spread_section(report),
        thresholds_section(report),
        speed_section(report),
        labels_section(report),
    ]
    parts += [quality_section(report), photos_section(report), _settings(report)]
    body = element("body", element("main", *parts))
    return "<!doctype html>\n" + element("html", element("head", *head), body, lang="en") + "\n"


def _lead(report: Report, title: str) -> Markup:
    choice = describe_choice(report.source.selector)
    if report.source.selector.token_budget is not None:
        choice = f"a budget of {report.source.selector.token_budget:g}, {choice.replace(' below ', ' in the ratios ')}"
    lead = f"Where an image is flat, one large patch stands for many small ones. Patches are chosen by {choice}."
    return element(
        "header", element("h1", title), element("p", lead, class_="lead"), _keys(report), _unread(report.left_out)
    )


def _keys(report: Report) -> Markup:
    found, low, high = report.summary, *report.summary.quantiles[::2]
    keys = [
        ("Tokens kept, on average", percent(found.share), f"9 of 10 photos keep {percent(low)} to {percent(high)}"),
        (
            "Predicted speed-up",
            f"{report.predicted(report.model):.2f} {TIMES}",
            f"ViT-{report.model}, by its operations",
        ),
    ]
    if report.measured is not None:
        paths = [timing.path for timing in report.measured.timings]
        promised = f"{report.predicted(report.model, paths):.2f} {TIMES} predicted"
        words = f"ViT-{report.model} here, {photos_of(len(paths))} with {promised}"
        keys.append(("Measured speed-up", f"{report.measured.speed_up:.2f} {TIMES}", words))
    if found.mixing is not None and found.mixing.coarse:
        share = percent(found.mixing.mixed / found.mixing.coarse)
        keys.append(("Coarse patches over several classes", share, "each has one token for all of them"))
    shown = [element("div", element("dt", k), element("dd", v, element("small", more))) for k, v, more in keys]
    return element("dl", *shown, class_="keys")


def _unread(left_out: Sequence[PhotoLeftOut]) -> Markup:
    if not left_out:
        return Markup()
    note = element("p", f"{photos_of(len(left_out))} left out, which could not be read.", class_="warn")
    rows = [(printable(str(photo.path)), printable(photo.reason)) for photo in left_out]
    return join([note, folded("Which ones", table("left-out", "Photos left out", ("photo", "reason"), rows))])


def _settings(report: Report) -> Markup:
    selector = report.source.selector
    rows = [
        ("command", report.command),
        ("sizes", _sizes_in_words(report.source)),
        ("patch sizes", ", ".join(size_names(selector))),
        ("scorer", printable(str(selector.scorer))),
        ("thresholds", " / ".join(f"{each:g}" for each in selector.thresholds) or "none: uniform patches"),
        ("token budget", "none" if selector.token_budget is None else f"{selector.token_budget:g}"),
    ]
    listed = [element("div", element("dt", name), element("dd", element("code", value))) for name, value in rows]
    return section("How this page was made", element("dl", *listed, class_="settings"))


def _sizes_in_words(source: Source) -> str:
    sizes = source.sizes
    if sizes.square is not None:
        return f"the middle of each photo, {sizes.square} {TIMES} {sizes.square} pixels"
    if sizes.longer is not None:
        return f"{sizes.longer} pixels along the longer side"
    if sizes.within is not None:
        return f"within {max(sizes.within)} {TIMES} {min(sizes.within)} pixels, as the config's tests resize them"
    return "as the photos are; name the size that the model sees with --size or --square, since it decides the share"
