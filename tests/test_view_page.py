"""The page of `aeheight view` in a headless browser: dragged, pointed at, tapped, looked at."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.browser import CHROMIUM, Page, browser
from tests.exports import make_export
from tests.two_zones import EAST, LAYERS, WEST, Served, serving

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look with"),
    pytest.mark.filterwarnings("ignore:Use `@` matmul"),  # rasterio's own
]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("page")
    make_export(place, (WEST, EAST), LAYERS, (2021, 2023))
    with serving(place / "export") as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


TILES = "document.querySelectorAll('#map img.leaflet-tile')"
DRAWN = f"{TILES}.length && [...{TILES}].every((tile) => tile.complete && tile.naturalWidth)"


def looked_at(page: Page, address: str, width=1000, height=700, *, phone=False) -> np.ndarray:
    """Open the page, and wait until all of its tiles are drawn."""
    page.complaints.clear()
    page.resize(width, height, phone=phone)
    page.open(address)
    page.until("document.readyState === 'complete' && " + DRAWN)
    return page.picture()


def test_the_divider_is_dragged(served, page):
    before = looked_at(page, served.address + "#left=reference&right=difference")
    page.mouse("mousePressed", 500, 500)
    for x in (480, 400, 301):
        page.mouse("mouseMoved", x, 500)
    page.mouse("mouseReleased", 301, 500)
    page.until("location.hash.includes('at=0.30')")
    after = page.picture()
    changed = (before != after).any(-1)[200:560]  # below the legends, above the values
    columns = np.flatnonzero(changed.any(0))
    assert columns.min() >= 301 - 34  # its handle and shadow
    assert columns.max() <= 500 + 34
    assert changed[:, 320:480].mean() > 0.5
    page("Input.dispatchKeyEvent", type="keyDown", key="End")
    page.until("location.hash.includes('at=1.0')")
    assert page.complaints == []


def test_sides_show_what_is_chosen(served, page):
    both = looked_at(page, served.address + "#left=height&right=height&at=0.5")
    page.evaluate(
        "const s = document.querySelector('#right select'); s.value = 'spread';"
        "s.dispatchEvent(new Event('change'))"
    )
    page.until("location.hash.includes('right=spread') && " + DRAWN)
    changed = (page.picture() != both).any(-1)[200:560]
    assert not changed[:, :480].any()
    assert changed[:, 530:].any()
    assert "≥ 5 m" in page.evaluate("document.querySelector('#right .ticks').innerText")


def test_values_under_the_pointer_and_years(served, page):
    looked_at(page, served.address)
    assert page.evaluate("document.querySelector('#year').value") == "2023"
    page.mouse("mouseMoved", 450, 400)
    page.until("document.querySelectorAll('dd').length === 6")
    shown = "[...document.querySelectorAll('#values dd')].map((e) => e.innerText)"
    reference, height, difference, *_ = page.evaluate(shown)
    assert difference == "+7.0 m"
    assert float(height.split()[0]) - float(reference.split()[0]) == pytest.approx(5, abs=0.11)
    page.evaluate(
        "const y = document.querySelector('#year'); y.value = '2021';"
        "y.dispatchEvent(new Event('change'))"
    )
    page.until(f"{shown}[2] === '+5.0 m'")
    assert page.complaints == []


def test_the_page_on_a_phone(served, page):
    looked_at(page, served.address, 375, 720, phone=True)
    page.tap(100, 360)
    page.until("document.querySelectorAll('dd').length === 6")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    boxes = page.evaluate(
        "Object.fromEntries(['left', 'right', 'values'].map((id) => {"
        "const b = document.getElementById(id).getBoundingClientRect();"
        "return [id, [b.left, b.top, b.right, b.bottom]]}))"
    )
    for left, top, right, bottom in boxes.values():
        assert 0 <= left < right <= 375
        assert 0 <= top < bottom <= 720
    assert boxes["left"][2] <= boxes["right"][0]
    assert boxes["left"][3] < 200 < 500 < boxes["values"][1]
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.card *')].filter((e) => e.offsetParent)"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    assert page.complaints == []


def test_what_it_says_of_the_map(served, page):
    looked_at(page, served.address)
    text = page.evaluate("document.body.innerText")
    assert "EGM96 height (EPSG:5773)" in text
    assert "Surveyed by nobody <b>" in text  # shown, not obeyed
    assert "Google DeepMind" in text
    assert "km" in page.evaluate("document.querySelector('.leaflet-control-scale').innerText")
    assert page.complaints == []


def test_trouble_goes_when_the_map_answers_again(tmp_path, page):
    """An export that cannot be read is told as such, and no longer than it lasts."""
    folder = make_export(tmp_path, [WEST], LAYERS)
    shown = "!document.getElementById('trouble').hidden"
    with serving(folder) as there:
        looked_at(page, there.address)
        assert not page.evaluate(shown)
        path = folder / "collection.json"
        data, made = path.read_bytes(), path.stat().st_mtime_ns
        path.write_text("{}")
        page.evaluate("dispatchEvent(new Event('focus'))")
        page.until(shown)
        told = page.evaluate("document.getElementById('trouble').textContent")
        assert told.startswith("The map cannot be read: The export cannot be read.")
        path.write_bytes(data)
        os.utime(path, ns=(made, made))
        page.evaluate("dispatchEvent(new Event('focus'))")
        page.until(f"!({shown})")
