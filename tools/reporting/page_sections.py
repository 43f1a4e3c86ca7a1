"""The sections of a page: each a chart or a sentence, and its figures as a table."""

from collections.abc import Mapping

from reporting import charts
from reporting.html_elements import NOTHING, TIMES, Markup, element, folded, join, percent, table
from reporting.photo_card import colour_key, size_names
from reporting.photo_figures import BINS, FACTORS
from reporting.predicted_speed import MODELS, speed_up
from reporting.report_content import Report, photos_of


def section(title: str, *content: object) -> Markup:
    """Put content under a heading."""
    return element("section", element("h2", title), *content)


def spread_section(report: Report) -> Markup:
    found = report.summary
    low, middle, high = map(percent, found.quantiles)
    figures = [
        ("photos", len(report.photos)),
        ("share of tokens kept, mean over photos", percent(found.share)),
        ("5 % of the photos keep at most", low),
        ("half of the photos keep at most", middle),
        ("95 % of the photos keep at most", high),
        ("tokens of all photos", sum(photo.tokens for photo in report.photos)),
        ("tokens of all photos in a uniform ViT", sum(photo.cells for photo in report.photos)),
    ]
    counts = [(f"{100 * n // BINS} to {100 * (n + 1) // BINS} %", c) for n, c in enumerate(found.histogram)]
    histogram = [
        charts.histogram(found.histogram, found.share),
        folded("Figures", table("summary", "Tokens kept", ("", "figure"), figures)),
        folded("The histogram as a table", table("histogram", "Photos by share", ("tokens kept", "photos"), counts)),
    ]
    cards = element("div", element("div", *histogram, class_="card"), _sizes(report), class_="pair")
    return section("How much is kept", cards)


def _sizes(report: Report) -> Markup:
    found, names = report.summary, size_names(report.source.selector)
    tokens = [count / max(sum(found.per_scale), 1) for count in found.per_scale]
    rows = [
        (name, count, percent(area), percent(share))
        for name, count, area, share in zip(names, found.per_scale, found.area, tokens, strict=True)
    ]
    head = "patches of", "number", "of the image", "of the tokens"
    chart = charts.sizes(names, found.area, tokens)
    return element(
        "div",
        colour_key(report.source.selector),
        chart,
        table("sizes", "Patches of all photos together", head, rows),
        class_="card",
    )


def thresholds_section(report: Report) -> Markup:
    found, thresholds = report.summary, report.source.selector.thresholds
    if not found.by_factor:
        return Markup()
    rows = [
        (f"{factor:.2f}", " / ".join(f"{factor * each:.3g}" for each in thresholds), percent(share))
        for factor, share in zip(FACTORS, found.by_factor, strict=True)
    ]
    words = "What these photos would keep, on average, if all thresholds were multiplied by the same factor."
    head = "factor", "thresholds", "tokens kept"
    card = [charts.curve(FACTORS, found.by_factor), _expectation(report)]
    shown = element("div", element("div", *card, class_="card"),
                    element("div", table("curve", words, head, rows), class_="card"), class_="pair")  # fmt: skip
    return section("Other thresholds", shown)


def _expectation(report: Report) -> Markup:
    """Say whether these photos keep what the calibration expected."""
    if report.calibration is None:
        return Markup()
    low, high = report.calibration["expected"]
    inside = low <= report.summary.share <= high
    rows = [
        ("photos it was made with", report.calibration["images"]),
        ("tokens that they keep", percent(report.calibration["share"])),
        ("as many others should keep at least", percent(low)),
        ("as many others should keep at most", percent(high)),
        ("these photos keep", percent(report.summary.share)),
    ]
    verdict = "What these photos keep is what the calibration expected."
    if not inside:
        verdict = "These photos keep another share than the calibration expected: are they of the same kind and size?"
    said = element("p", verdict, class_=None if inside else "warn")
    return join([said, table("calibration", "The calibration", ("", "figure"), rows)])


def speed_section(report: Report) -> Markup:
    rows = [(f"ViT-{name}", f"{report.predicted(name):.2f} {TIMES}") for name in MODELS]
    rests_on = (
        "Predicted: the floating point operations of a uniform plain ViT as a multiple of those with these patches, "
        "all photos together. It rests on the architecture alone (blocks with global attention, embedding; no heads), "
        "and holds where matrix products take the time: large models and images."
    )
    parts = [
        element("p", rests_on),
        table("speed", "Predicted speed of the backbone", ("model", "times as fast"), rows),
    ]
    if report.measured is not None:
        timings = [
            (report.names[t.path], f"{t.uniform:.1f}", f"{t.adaptive:.1f}", f"{t.uniform / t.adaptive:.2f} {TIMES}",
             f"{report.predicted(report.model, [t.path]):.2f} {TIMES}")
            for t in report.measured.timings
        ]  # fmt: skip
        head = "photo", "uniform, ms", "adaptive, ms", "times as fast", "predicted"
        said = f"Measured, ViT-{report.model}, one photo at a time: {report.measured.machine}."
        parts += [element("p", said), table("measured", "Measured speed of the backbone", head, timings)]
    return section("Speed", *parts)


def labels_section(report: Report) -> Markup:
    found = report.summary.mixing
    if found is None:
        return Markup()
    rows = [
        ("coarse patches", found.coarse, ""),
        ("of them with several classes", found.mixed, percent(found.mixed / max(found.coarse, 1))),
        ("pixels on borders between classes", found.borders, ""),
        ("of them under coarse patches", found.border, percent(found.border / max(found.borders, 1))),
    ]
    words = (
        "A coarse patch over several classes gives all of its pixels one token. The lower this share at the tokens "
        "that you can afford, the better; raise a threshold as long as it stays low."
    )
    return section("What coarse patches hide", element("p", words),
                    table("labels", "By the masks", ("", "number", "share"), rows))  # fmt: skip


def quality_section(report: Report) -> Markup:
    if report.quality is None:
        return Markup()
    nested = {name: value for name, value in report.quality.items() if isinstance(value, Mapping)}
    columns = list(dict.fromkeys(column for value in nested.values() for column in value))
    tables = []
    flat = [(name, f"{value:g}") for name, value in report.quality.items() if name not in nested]
    if flat:
        tables.append(table("quality", "Figures of the evaluation", ("measure", "figure"), flat))
    if nested:
        rows = [
            (name, *(f"{value[c]:g}" if c in value else NOTHING for c in columns)) for name, value in nested.items()
        ]
        tables.append(table("quality-by-scale", "By what stands under the patches", ("", *columns), rows))
    return section("Quality, as it was evaluated", *tables)


def photos_section(report: Report) -> Markup:
    """The cards, and all photos in a table."""
    names = size_names(report.source.selector)
    head = "photo", "pixels", "tokens", "of", "kept", *names, "times as fast"
    rows = []
    for photo in report.photos:
        faster = speed_up(MODELS[report.model], report.source.selector.patch_size, [(photo.cells, photo.per_scale)])
        size = f"{photo.size[1]} {TIMES} {photo.size[0]}"
        rows.append((report.names[photo.path], size, photo.tokens, photo.cells, percent(photo.share),
                     *photo.per_scale, f"{faster:.2f} {TIMES}"))  # fmt: skip
    caption = f"All photos, those that keep most tokens first; speed as predicted for ViT-{report.model}"
    shown = "all" if len(report.cards) == len(report.photos) else f"{len(report.cards)} of {len(report.photos)}"
    words = f"From those that keep most tokens to those that keep fewest: {shown} are drawn. "
    words += "In the maps of scores, edges where no whole patch of that size fits are grey."
    every = folded(f"All {photos_of(len(rows))} in numbers", table("photos", caption, head, rows))
    return section("Photos", element("p", words), every, *report.cards)
