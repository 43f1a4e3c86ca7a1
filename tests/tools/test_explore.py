"""explore: its figures are those of the selector, and moving a slider in a browser changes them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

for package in ("tqdm", "cv2"):
    pytest.importorskip(package, reason="explore needs it")

from apt_dense import PatchSelector

from reporting.explored_photo import BY_BUDGET, BY_THRESHOLDS, Settings, explore_photo
from reporting.photo_figures import to_image
from shared.picture_layout import resize_longer_side
from support.browser import ask_page, needed_browser
from support.read_page import Page, number

START = Settings(BY_THRESHOLDS, 5.5, 4.0, 60, 16, 256, "base")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """200 x 320 pixels, from flat at the left to noisy at the right."""
    rng = np.random.default_rng(0)
    noise = np.linspace(0, 30, 320)[:, None] * rng.standard_normal((200, 320, 3))
    return (120 + noise).clip(0, 255).astype(np.uint8)


def counts_of(photo: np.ndarray, longer: int, selector: PatchSelector) -> list[int]:
    """Patches of each size, counted at their first cells."""
    picture = resize_longer_side(photo, longer)
    scale_map, counts = selector.scale_map(to_image(picture, selector))[0].tolist(), [0] * selector.num_scales
    for y, row in enumerate(scale_map):
        for x, scale in enumerate(row):
            counts[scale] += y % 2**scale == 0 and x % 2**scale == 0
    return counts


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"thresholds": (5.5, 4.0)}),
        ({"first": 6.5, "second": 5.0}, {"thresholds": (6.5, 5.0)}),
        ({"first": 3.0, "second": 4.0}, {"thresholds": (3.0, 3.0)}),
        ({"by": BY_BUDGET, "budget": 40}, {"thresholds": (5.5, 4.0), "token_budget": 0.4}),
        ({"patch_size": 8, "longer": 224}, {"thresholds": (5.5, 4.0), "patch_size": 8}),
    ],
)
def test_figures_are_those_of_the_patches(photo: np.ndarray, changes: dict, options: dict) -> None:
    settings = START._replace(**changes)
    found = explore_photo(photo, settings)
    page = Page(str(found.figures))
    expected = counts_of(photo, settings.longer, PatchSelector(**options))
    assert [int(row[1]) for row in page.tables["explored"]] == expected
    cells = sum(count * 4**scale for scale, count in enumerate(expected))
    text = " ".join(page.texts["p"])
    assert f"{sum(expected)} of {cells} tokens kept ({100 * sum(expected) / cells:.1f} %)" in text
    assert ("may not rise" in text) == (settings.second > settings.first)
    assert "floating point operations" in text and "nothing was timed" in text
    assert len(found.scores) == 2 and found.patches.shape[1] >= 700


def test_fewer_tokens_promise_more_speed(photo: np.ndarray) -> None:
    said = [str(explore_photo(photo, START._replace(by=BY_BUDGET, budget=share)).figures) for share in (100, 60, 30)]
    speeds = [number(text.split("predicted ")[1]) for text in said]
    assert 0.99 < speeds[0] <= 1 and speeds == sorted(speeds) and speeds[2] > 3


# ---- the page, with Gradio


@pytest.fixture(scope="module")
def address(photo: np.ndarray) -> Iterator[str]:
    pytest.importorskip("gradio", reason="serves the page")
    import explore

    page = explore.build(photo, START)
    yield explore.serve(page)
    page.close()


def test_a_client_gets_the_figures(photo: np.ndarray, address: str, tmp_path: Path) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    import cv2

    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path))
    given = gradio_client.handle_file(str(tmp_path / "photo.png"))
    for settings in (START, START._replace(first=6.5, second=5.0)):
        *pictures, figures = client.predict(given, *settings, api_name="/explore")
        expected = counts_of(photo, 256, PatchSelector(thresholds=(settings.first, settings.second)))
        assert [int(row[1]) for row in Page(figures).tables["explored"]] == expected and len(pictures) == 3
    assert "Give a photo" in client.predict(None, *START, api_name="/explore")[-1]


MOVE = """
const seen = page.document, figures = () => seen.querySelector("#explored");
await until(figures);
const read = () => [...figures().querySelectorAll("tbody tr")].map(row => row.cells[1].textContent);
const before = read();
const slider = [...seen.querySelectorAll("input[type=number]")].find(each => each.value === "5.5");
Object.getOwnPropertyDescriptor(page.HTMLInputElement.prototype, "value").set.call(slider, "6.5");
for (const kind of ["input", "change"]) slider.dispatchEvent(new page.Event(kind, {bubbles: true}));
slider.dispatchEvent(new page.FocusEvent("blur"));
await until(() => figures() && read().join() !== before.join());
const root = seen.documentElement;
const outside = page.performance.getEntriesByType("resource").map(entry => new URL(entry.name))
  .filter(url => url.protocol.startsWith("http") && url.hostname !== "127.0.0.1").map(String);
return {before, after: read(), wide: root.scrollWidth, room: root.clientWidth, outside};
"""


@pytest.mark.parametrize("width", [360, 1200])
def test_moving_a_slider_in_a_browser_changes_the_figures(photo: np.ndarray, address: str, width: int) -> None:
    needed_browser()
    seen = ask_page(address, MOVE, width).value
    assert list(map(int, seen["before"])) == counts_of(photo, 256, PatchSelector(thresholds=(5.5, 4.0)))
    assert list(map(int, seen["after"])) == counts_of(photo, 256, PatchSelector(thresholds=(6.5, 4.0)))
    assert seen["wide"] <= seen["room"], "nothing sticks out"
    assert not seen["outside"]


def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="serves the page")
    import explore

    with pytest.raises(SystemExit, match="not a readable photograph"):
        (tmp_path / "photo.jpg").write_bytes(b"nothing")
        explore.main([str(tmp_path / "photo.jpg")])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match="give another one, or none"):
        explore.main(["--port", str(taken.getsockname()[1])])
    with pytest.raises(SystemExit) as ended:
        explore.main(["--thresholds", "5.5", "12"])
    assert ended.value.code == 2 and "12" in capsys.readouterr().err
