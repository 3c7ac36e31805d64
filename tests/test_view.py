"""The command `view`: tiles and values against known answers, and the server."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import Transformer

from aeheight import tiling, viewer
from aeheight.errors import InputError, NotYetError
from aeheight.exported import Tile, read_export
from aeheight.grid import Grid
from aeheight.limits import robust, value_limits
from aeheight.steps import view as step
from aeheight.store import Store
from tests.exports import degrees, make_export
from tests.runs import Regions, one_message, run_here
from tests.two_zones import EAST, LAYERS, WEST, Served, serving, slope

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul")
"""Rasterio's own."""

EARTH = 2 * np.pi * 6378137
ZOOM, X, Y = 12, 655, 1583
SIZE = EARTH / 2**ZOOM
"""Edge of a tile of that level, metres of Web Mercator."""
SQUARE = Grid("EPSG:3857", SIZE / 512, X * SIZE - EARTH / 2, EARTH / 2 - Y * SIZE, (512, 512))
"""The very pixels of one tile."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two zones and two years; tests must leave it as it is."""
    place = tmp_path_factory.mktemp("view")
    make_export(place, (WEST, EAST), LAYERS, (2021, 2023))
    return place


@pytest.fixture(scope="module")
def served(store) -> Iterator[Served]:
    with serving(store / "export") as found:
        yield found


def tile_of(lon: float, lat: float, zoom: int) -> tuple[int, int, int]:
    """Zoom, column and row of the tile at a place."""
    north = np.arcsinh(np.tan(np.radians(lat))) / np.pi
    return zoom, int((lon + 180) / 360 * 2**zoom), int((1 - north) / 2 * 2**zoom)


JOIN = tile_of(-120.02, 38.66, 10)
"""A tile that both zones share."""
AT = "/".join(map(str, JOIN))


def colours(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """As matplotlib paints them: (..., 3)."""
    return mpl.colormaps[name](np.clip((values - low) / (high - low), 0, 1), bytes=True)[..., :3]


# The catalogue.


def test_layers_in_the_order_to_look_at(store):
    found = read_export(Store.at(store / "export"))
    names = [layer.name for layer in found.layers]
    assert names == ["reference", "height", "difference", "spread", "novelty", "ripples"]
    assert found.years == (2021, 2023)
    assert found.vertical_datum == "EGM96 height (EPSG:5773)"
    assert "Surveyed by nobody <b>" in found.attribution
    lon, lat = (
        np.concatenate([a.ravel() for a in axis])
        for axis in zip(*map(degrees, (WEST, EAST)), strict=True)
    )
    west, south, east, north = found.bounds
    assert west < lon.min() < west + 0.01
    assert south < lat.min() < south + 0.01
    assert east - 0.01 < lon.max() < east
    assert north - 0.01 < lat.max() < north


def test_the_map_is_as_large_as_its_largest_layer(tmp_path):
    """The reference, which is shown first, has tiles in the west only."""
    make_export(tmp_path, (WEST, EAST), LAYERS)
    path = tmp_path / "export" / EAST.name / "2021" / "tile.json"
    item = json.loads(path.read_text())
    for name in ("reference", "difference"):
        del item["assets"][name]
    path.write_text(json.dumps(item))
    found = read_export(Store.at(tmp_path / "export"))
    assert found.layers[0].name == "reference"
    assert len(found.layers[0].files) == 1
    assert found.bounds[0] < degrees(WEST)[0].min()
    assert found.bounds[2] > degrees(EAST)[0].max()


@pytest.mark.parametrize(
    "href",
    ["/etc/passwd", "../../../secret.tif", "http://127.0.0.1:1/a.tif", "s3://bucket/a.tif",
     "/vsicurl/http://127.0.0.1:1/a.tif", "file:///etc/passwd"],
)  # fmt: skip
def test_a_catalogue_leads_to_its_own_files_only(tmp_path, href):
    make_export(tmp_path, [WEST], {"height": slope})
    folder = tmp_path / "export"
    for path, kind in ((folder / WEST.name / "2021" / "tile.json", "assets"),
                       (folder / "collection.json", "links")):  # fmt: skip
        told = path.read_text()
        found = json.loads(told)
        one = found["assets"]["height"] if kind == "assets" else next(
            link for link in found["links"] if link["rel"] == "item"
        )  # fmt: skip
        one["href"] = href
        path.write_text(json.dumps(found))
        with pytest.raises(InputError, match="outside of the export") as caught:
            read_export(Store.at(folder))
        assert repr(href) in str(caught.value)
        path.write_text(told)


@given(st.floats(-180, 180), st.floats(0.01, 170), st.floats(-180, 179), st.floats(0.01, 170))
def test_a_tile_touches_what_it_shares_a_meridian_with(west, width, left, wide):
    east = west + width - 360 * (west + width > 180)
    tile = Tile(Path("a.tif"), (west, 10.0, east, 20.0))
    right = min(left + wide, 180.0)
    meridians = np.linspace(west, west + width, 4001)
    inside = any(
        left + 1e-9 <= (m + 180) % 360 - 180 <= right - 1e-9  # but for rounding
        for m in meridians
    )
    assert not inside or tile.touches((left, 12.0, right, 13.0))
    assert not tile.touches((left, 21.0, right, 22.0))


def test_ground_across_the_180th_meridian_is_one_piece(tmp_path):
    grid = Grid("EPSG:32601", 100.0, 250000.0, 5600000.0, (60, 500))
    make_export(tmp_path, [grid], {"height": lambda lon, lat: (lon % 360) * 100})
    found = read_export(Store.at(tmp_path / "export"))
    west, _, east, _ = found.bounds
    assert 179 < west < 180 < east < 181
    with serving(tmp_path / "export") as there:
        # On both sides: columns 127 and 0 of level 7, row 43.
        halves = [there.tile(f"height/2021/7/{x}/43") for x in (127, 0)]
    assert all((half[..., 3] > 0).any() for half in halves)


# Tiles.


def test_a_tile_has_the_colours_of_its_pixels(tmp_path):
    values = np.linspace(-20, 120, 512 * 512).reshape(512, 512).astype(np.float32)
    values[100:200, 300:400] = np.nan
    make_export(tmp_path, [SQUARE], {"height": lambda lon, lat: values})
    path = tmp_path / "export" / SQUARE.name / "2021" / "height.tif"
    data = tiling.tile_png([path], X, Y, ZOOM, 512, "viridis", (0.0, 100.0))
    found = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)
    known = np.isfinite(values)
    np.testing.assert_array_equal(found[..., 3], 255 * known)
    expected = colours(values, "viridis", 0, 100).astype(int)
    assert np.abs(found[..., :3] - expected)[known].max() <= 4  # a step of 255 beside one of 256


def test_two_zones_join_without_a_gap(served):
    zoom, x, y = JOIN
    west, south, east, north = tiling.tile_bounds(x, y, zoom)
    assert west < -120.1 < -119.9 < east
    found = served.tile(f"height/2021/{AT}")
    side = (np.arange(512) + 0.5) / 512
    lon = west + side * (east - west)
    top, bottom = (np.log(np.tan(np.pi / 4 + np.radians(v) / 2)) for v in (north, south))
    lat = np.degrees(2 * np.arctan(np.exp(top + side * (bottom - top))) - np.pi / 2)
    lon, lat = np.meshgrid(lon, lat)
    inside = np.zeros(lon.shape, bool)
    for grid in (WEST, EAST):
        px, py = Transformer.from_crs(4326, grid.crs, always_xy=True).transform(lon, lat)
        left, low, right, high = grid.bounds
        inside |= (left + 300 < px) & (px < right - 300) & (low + 300 < py) & (py < high - 300)
    expected = slope(lon, lat) + 5
    near_lake = np.hypot((lon + 120.2) * 0.78, lat - 38.65) < 0.013
    sure = inside & ~near_lake
    assert sure.mean() > 0.3
    assert (found[sure][:, 3] == 255).all()
    limits = {layer["name"]: layer["limits"] for layer in served.json("layers.json")["layers"]}
    low, high = limits["height"]
    wrong = np.abs(found[..., :3] - colours(expected, "viridis", low, high).astype(int)).max(-1)
    assert wrong[sure].max() <= 8  # a pixel of 100 m is half a metre of height
    assert (found[~np.isfinite(expected)][:, 3] == 0).mean() > 0.9


def test_a_year_is_another_picture(served):
    now, later = (served.tile(f"novelty/{year}/{AT}") for year in (2021, 2023))
    assert (now[..., 3] == later[..., 3]).all()
    assert (now != later).any()


def test_a_tile_beside_the_map_is_transparent(served):
    assert not served.tile("height/2021/10/0/0")[..., 3].any()


# Values.


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, WEST.shape[0] - 1), col=st.integers(0, 180), part=st.floats(0.05, 0.95))
def test_values_are_those_of_rasterio(served, store, row, col, part):
    x, y = WEST.left + (col + part) * 100, WEST.top - (row + part) * 100
    lon, lat = Transformer.from_crs(WEST.crs, 4326, always_xy=True).transform(x, y)
    values = served.json(f"values/2023?lon={lon!r}&lat={lat!r}")["values"]
    for name, value in values.items():
        with rasterio.open(store / "export" / WEST.name / "2023" / f"{name}.tif") as source:
            expected = float(next(source.sample([(x, y)]))[0])
        assert value == (None if np.isnan(expected) else expected)


def test_no_value_beside_the_map(served):
    assert set(served.json("values/2021?lon=10&lat=10")["values"].values()) == {None}


# Limits.


def test_limits_are_common_and_from_overviews(served):
    limits = {layer["name"]: layer["limits"] for layer in served.json("layers.json")["layers"]}
    assert limits["reference"] == limits["height"]
    known = [slope(*degrees(grid)) + more for grid in (WEST, EAST) for more in (0, 2, 5, 7)]
    low, high = np.nanquantile(np.concatenate([a.ravel() for a in known]), [0.01, 0.99])
    assert limits["height"] == pytest.approx([low, high], abs=2)
    assert limits["difference"] == [-7, 7]
    assert limits["spread"] == [3, 5]
    low, high = limits["novelty"]
    assert low <= 0.9
    assert high >= 1.1
    assert limits["ripples"][0] < 0 < limits["ripples"][1]


def test_limits_of_nothing_are_a_scale_all_the_same():
    assert value_limits([np.full((2, 2), np.nan, np.float32)]) == (0, 1)
    assert robust([]) == 1
    low, high = value_limits([np.zeros((2, 2), np.float32)])
    assert low < high


def test_the_scale_is_shown_in_the_colours_of_the_tiles(served):
    for layer in served.json("layers.json")["layers"]:
        assert len(layer["colours"]) == 32
    first = served.json("layers.json")["layers"][0]["colours"]
    told = np.array([mpl.colors.to_rgb(colour) for colour in first])
    expected = mpl.colormaps["viridis"](np.linspace(0, 1, 32))[:, :3]
    assert np.abs(told - expected).max() < 4 / 255


# The server.


@pytest.mark.parametrize(
    "path",
    [
        "tiles/height/2021/10/1024/393.png",
        "tiles/height/2021/10/169/1024.png",
        "tiles/height/2021/23/0/0.png",
        "tiles/height/2021/99/0/0.png",
        "tiles/height/2020/10/169/393.png",
        "tiles/nothing/2021/10/169/393.png",
        "tiles/height/2021/10/-1/393.png",
        "tiles/..%2f..%2fheight/2021/10/169/393.png",
        "values/1999?lon=0&lat=0",
        "view.css%00",
        "..%2f..%2fpyproject.toml",
        "../cli.py",
        "leaflet/..%2f__init__.py",
        "leaflet/%2e%2e/__init__.py",
        "leaflet/%2fetc%2fpasswd",
        "collection.json",
        "leaflet/",
    ],
)
def test_what_is_not_there_is_not_found(served, path):
    assert served.get(path)[0] in (403, 404), path


@pytest.mark.parametrize("query", ["", "lon=1", "lon=x&lat=1", "lon=nan&lat=0", "lon=0&lat=91"])
def test_places_that_are_none(served, query):
    assert served.get(f"values/2021?{query}")[0] == 400


def test_answers_are_asked_for_again_and_stay_within_the_page(served):
    for path in ("", "view.js", "layers.json", f"tiles/height/2021/{AT}.png"):
        code, _, headers = served.get(path)
        assert code == 200
        assert headers["Cache-Control"] == "no-cache"
        assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("name", "code"),
    [("localhost", 200), ("LocalHost:80", 200), ("127.0.0.1", 200), ("[::1]:8000", 200),
     ("evil.example", 404), ("127.0.0.1.evil.example", 404), ("localhost.evil.example", 404),
     ("evil.example:8000", 404), ("127.0.0.11", 404), ("", 404)],
)  # fmt: skip
def test_only_this_machine_is_answered(served, name, code):
    """A page of elsewhere whose own name leads here (DNS rebinding) reads nothing."""
    for path in ("", "layers.json", f"tiles/height/2021/{AT}.png", "leaflet/leaflet.js"):
        assert served.get(path, Host=name)[0] == code, path


def test_a_host_that_was_asked_for_is_answered_by_its_name():
    with socket.create_server(("127.0.0.1", 0)) as near:
        assert re.match(viewer._names("127.0.0.1.nip.io", near), "127.0.0.1.nip.io")
        assert not re.match(viewer._names("127.0.0.1.nip.io", near), "127x0.0.1.nip.io")
    with socket.create_server(("0.0.0.0", 0)) as far:
        assert re.match(viewer._names("0.0.0.0", far), "anything.example")


def test_an_export_made_anew_is_shown(store, tmp_path):
    make_export(tmp_path, [WEST], LAYERS)
    with serving(tmp_path / "export") as there:
        before = there.json("layers.json")
        (tmp_path / "export" / "collection.json").unlink()  # as `aeheight export` begins
        assert there.json("layers.json") == before
        (tmp_path / "export" / WEST.name / "2021" / "spread.tif").unlink()
        assert there.get(f"tiles/spread/2021/{AT}.png")[0] == 404
        make_export(tmp_path, [WEST], {"height": lambda lon, lat: slope(lon, lat) + 1000})
        after = there.json("layers.json")
        assert after["stamp"] != before["stamp"]
        assert [layer["name"] for layer in after["layers"]] == ["height"]
        assert after["layers"][0]["limits"][0] > 900
        (tmp_path / "export" / "collection.json").write_text("{}")
        assert there.get("layers.json")[0] == 503


# The command.


@pytest.fixture
def region(store, tmp_path):
    made = Regions(tmp_path, {"embeddings": {"href": "none.tif", "year": 2021}}).write("view")
    shutil.copytree(store, made.store, copy_function=os.link)
    return made


def test_the_plan(region):
    result = run_here("view", region.path, "--plan", "--port", "8123")
    assert result.code == 0, result.err
    assert "http://127.0.0.1:8123/" in result.out
    assert "difference  4 files, colours -7 to 7 m" in result.out
    told = json.loads(run_here("view", region.path, "--plan", "--json").out)
    assert told["layers"]["height"]["files"] == 4
    assert told["years"] == [2021, 2023]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(region, command, stop):
    started = [*command, "view", str(region.path), "--port", "0"]
    with subprocess.Popen(
        started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        line = job.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(address) as answer:
            assert b"leaflet" in answer.read()
        job.send_signal(stop)
        out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (0, "", "")


def test_a_port_that_is_taken(region):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_here("view", region.path, "--port", port)
    assert result.code == 2
    one_message(result.err, port, "--port 0")


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine(region, host):
    result = run_here("view", region.path, "--host", host, "--port", "0")
    assert result.code == 2
    one_message(result.err, host)


def test_without_an_export(tmp_path):
    made = Regions(tmp_path, {"embeddings": {"href": "none.tif", "year": 2021}}).write("bare")
    result = run_here("view", made.path)
    assert result.code == 2
    one_message(result.err, "aeheight export")
    with pytest.raises(NotYetError, match="aeheight export"):
        read_export(Store.at(tmp_path / "export"))


def test_an_export_elsewhere_is_to_be_copied():
    with pytest.raises(InputError, match="copy s3://bucket/run/export to FOLDER/export"):
        read_export(Store.at("s3://bucket/run/export"))


@pytest.mark.parametrize("content", ["", "[]", '{"links": [{"rel": "item"}]}'])
def test_a_damaged_catalogue(region, content):
    path = region.store / "export" / "collection.json"
    path.unlink()
    path.write_text(content)
    result = run_here("view", region.path, "--plan")
    assert result.code == 2
    one_message(result.err, "damaged")


def test_a_missing_file(region):
    (region.store / "export" / WEST.name / "2021" / "height.tif").unlink()
    result = run_here("view", region.path, "--plan")
    assert result.code == 2
    one_message(result.err, "height.tif", "verify --repair")


def test_a_damaged_file_is_named(tmp_path):
    """Its blocks are gone, its header is whole: GDAL's own words name no file."""
    make_export(tmp_path, [SQUARE], {"height": lambda lon, lat: lon * 1000})
    path = tmp_path / "export" / SQUARE.name / "2021" / "height.tif"
    with rasterio.open(path) as source:
        offset = min(int(source.tags(ns="TIFF", bidx=1).get(f"BLOCK_OFFSET_{x}_{y}", 1 << 40))
                     for x in range(4) for y in range(4))  # fmt: skip
    data = bytearray(path.read_bytes())
    first = min(offset, len(data) // 2)
    data[first:] = b"\xff" * (len(data) - first)
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"height\.tif: "):
        tiling.tile_png([path], X, Y, ZOOM, 512, "viridis", (0.0, 1.0))
    with pytest.raises(OSError, match=r"height\.tif: "):
        tiling.sample(path)
    lon, lat = (float(axis[300, 300]) for axis in degrees(SQUARE))
    with pytest.raises(OSError, match=r"height\.tif: "):
        tiling.value_at([path], lon, lat)


def test_packages_that_are_not_installed(region, monkeypatch):
    monkeypatch.setattr(step, "_NEEDED", {"rio_nothing": "rio-nothing", "xstatic.none.x": "X"})
    result = run_here("view", region.path)
    assert result.code == 2
    one_message(result.err, "rio-nothing and X", "pip install")
