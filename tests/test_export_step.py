"""The command `export`: files, catalogue and pictures of a map, and what may interrupt it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import CRS
from rio_cogeo.cogeo import cog_validate

from aeheight.cube import open_tree
from aeheight.exported import read_export
from aeheight.receipts import Ledger, receipt_for
from aeheight.steps.tiles import picture_cut
from aeheight.store import Store
from aeheight.windows import tile, whole
from tests.runs import Region, arrays, flip, one_message, run_here, snapshot
from tests.test_calibrate import DEGREES, GRID, Map, make_map

SMALL = ("--set", "export.tile=80", "--set", "export.block=128")
LAYERS = ("height", "novelty", "spread")


@pytest.fixture(scope="module")
def workers(scheduler):
    """Where the commands of this file compute."""
    return "--scheduler", scheduler


@pytest.fixture(scope="module")
def done(tmp_path_factory, workers) -> Map:
    """A map that was exported in tiles of 80 px; tests must leave it as it is."""
    made = make_map(tmp_path_factory.mktemp("exported"))
    result = run_here("export", made.region.path, *SMALL, *workers)
    assert result.code == 0, result.err
    assert "12 shards done" in result.out
    return made


def files(region: Region, pattern: str) -> list[Path]:
    return sorted((region.store / "export").rglob(pattern))


def assembled(region: Region, layer: str, year: int, grid=GRID) -> np.ndarray:
    """All tiles of a layer side by side, placed by their own transforms."""
    out = np.full(grid.shape, np.nan, np.float32)
    for path in files(region, f"{year}/{layer}-*.tif"):
        with rasterio.open(path) as found:
            row = (grid.top - found.transform.f) / grid.resolution
            col = (found.transform.c - grid.left) / grid.resolution
            assert abs(row - round(row)) < 1e-9
            assert abs(col - round(col)) < 1e-9
            place = np.s_[round(row) : round(row) + found.height,
                          round(col) : round(col) + found.width]  # fmt: skip
            assert np.isnan(out[place]).all()
            out[place] = found.read(1)
    return out


# What is made.


def test_tiles_are_the_map_bit_for_bit(done):
    expected = arrays(done.region.heights)
    for number, year in enumerate((2021, 2022)):
        for layer in LAYERS:
            np.testing.assert_array_equal(
                assembled(done.region, layer, year), expected[layer][number]
            )


def test_every_file_is_valid_and_says_what_it_is(done):
    found = files(done.region, "*.tif")
    assert len(found) == 2 * len(LAYERS) * 6
    for path in found:
        assert cog_validate(path, strict=True) == (True, [], [])
        with rasterio.open(path) as opened:
            tags, crs = opened.tags(), CRS.from_wkt(opened.crs.to_wkt())
            assert np.isnan(opened.nodata)
            assert tags["AREA_OR_POINT"] == "Area"
            assert tags["LAYER"] in path.name
            assert tags["YEAR"] in str(path)
            assert len(tags["CHECKPOINT"]) >= 7
            if "height" in path.name:
                assert [part.to_epsg() for part in crs.sub_crs_list] == [32610, 5773]
                assert (tags["VERTICAL_DATUM"], tags["SURFACE"]) == ("EPSG:5773", "dsm")
                assert opened.units == ("metre",)
            else:
                assert crs.to_epsg() == 32610


def test_items_and_collection_are_stac(done):
    folder = done.region.store / "export"
    found = pystac.Collection.from_file(str(folder / "collection.json"))
    items = list(found.get_items())
    assert len(items) == 2 * 6 + 1
    for path in [folder / "collection.json", *files(done.region, "r*.json")]:
        content = json.loads(path.read_text())
        links = {link["rel"] for link in content["links"]}
        assert {"root"} <= links
        pystac.validation.validate_dict(content | {"stac_extensions": []})
        for link in content["links"]:
            assert (path.parent / link["href"]).is_file(), link


def test_the_catalogue_tells_a_viewer_of_every_file(done):
    found = read_export(Store.at(done.region.store / "export"))
    assert [layer.name for layer in found.layers] == ["height", "spread", "novelty"]
    assert found.years == (2021, 2022)
    assert {path for layer in found.layers for path in layer.files} == set(
        files(done.region, "*.tif")
    )


def item_facts(done: Map) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text())) for path in files(done.region, "r*.json")]


def test_items_describe_their_files(done):
    """The extensions' required and promised fields, by hand: their schemas are on the web only."""
    for path, item in item_facts(done):
        told = item["properties"]
        assert told["proj:code"] == "EPSG:32610"
        assert told["processing:level"] == "L4"
        assert set(told["processing:software"]) == {"aeheight", "rasterio"}
        assert told["start_datetime"][:4] == told["end_datetime"][:4] == path.parent.name
        assert {"derived_from", "collection"} <= {link["rel"] for link in item["links"]}
        assert set(item["assets"]) == set(LAYERS)
        for asset in item["assets"].values():
            file = path.parent / asset["href"]
            data = file.read_bytes()
            assert asset["file:size"] == len(data)
            assert asset["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
            with rasterio.open(file) as opened:
                assert told["proj:shape"] == list(opened.shape)
                np.testing.assert_allclose(
                    told["proj:transform"], list(opened.transform)[:6], atol=1e-9
                )
                np.testing.assert_allclose(told["proj:bbox"], opened.bounds, atol=1e-9)
                values = opened.read(1).astype(np.float64)
            (band,) = asset["raster:bands"]
            assert (band["data_type"], band["nodata"]) == ("float32", "nan")
            assert band["statistics"]["mean"] == pytest.approx(np.nanmean(values))
            assert band["statistics"]["stddev"] == pytest.approx(np.nanstd(values))
            assert band["statistics"]["maximum"] == np.nanmax(values)


def test_the_model_is_an_item_too(done):
    model = json.loads((done.region.store / "export" / "model.json").read_text())
    told = model["properties"]
    for key in ("mlm:name", "mlm:architecture", "mlm:tasks", "mlm:input", "mlm:output"):
        assert told[key], key
    asset = model["assets"]["model"]
    checkpoint = done.region.store / "export" / asset["href"]
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert asset["file:checksum"] == "1220" + digest
    assert asset["roles"] == ["mlm:model"]
    assert model["geometry"] is None


def test_pictures_show_the_map(done):
    for name, bands in (("quicklook", "RGBA"), ("hillshade", "LA")):
        paths = files(done.region, f"{name}.png")
        assert [path.parent.name for path in paths] == ["2021", "2022"]
        with Image.open(paths[0]) as picture:
            assert (picture.size, picture.mode) == ((200, 150), bands)
            seen = np.asarray(picture)[..., -1] > 0
        known = np.isfinite(arrays(done.region.heights)["height"][0])
        assert not (seen & ~known).any()
        assert (seen == known).mean() > 0.98  # no slope is known beside the lake


def test_the_plan_writes_nothing_and_a_rerun_neither(done, workers, tmp_path):
    made = make_map(tmp_path)
    before = snapshot(made.region.store)
    result = run_here("export", made.region.path, "--plan", *SMALL)
    assert result.code == 0, result.err
    assert snapshot(made.region.store) == before
    for words in ("tile px", "12", "temporary bytes", "peak worker bytes"):
        assert words in result.out
    before = snapshot(done.region.store / "export")
    again = run_here("export", done.region.path, *SMALL, *workers)
    assert "0 shards done in 0.0 s, 12 done before" in again.out
    assert snapshot(done.region.store / "export") == before


def test_a_lost_collection_is_made_again(done, tmp_path, workers):
    """As after a driver that died between the last tile and the collection."""
    twin = twin_of(done, tmp_path)
    collection = twin.store / "export" / "collection.json"
    data = collection.read_bytes()
    collection.unlink()
    result = run_here("export", twin.path, *SMALL, *workers)
    assert result.code == 0, result.err
    assert collection.read_bytes() == data


def test_heights_that_are_gone_take_their_files_with_them(done, tmp_path, workers):
    """One tile of the map is made again, from other inputs, and is all nodata now."""
    twin = twin_of(done, tmp_path)
    tree = open_tree(Store.at(twin.heights))
    ledger = Ledger(Store.at(twin.store / "heights.receipts"))
    shards = [s for s in tree.template.shards("height") if (s.year, s.region.col) == (2021, 192)]
    for shard in shards:  # the eastern edge, which tiles of 80 px share with others
        nothing = np.full(shard.region.shape, np.nan, np.float32)
        later = replace(shard, inputs="later")
        ledger.forget([shard.name])
        digest, valid = tree.write(later, nothing), ~np.isnan(nothing)
        ledger.leave(receipt_for(later, nothing, digest, valid, ledger.current().key, 0.0))
    result = run_here("export", twin.path, *SMALL, *workers)
    assert result.code == 0, result.err
    assert "2 shards done" in result.out
    assert "10 done before" in result.out
    np.testing.assert_array_equal(
        assembled(twin, "height", 2021), arrays(twin.heights)["height"][0]
    )


def twin_of(done: Map, folder: Path) -> Region:
    """A copy of a finished export."""
    twin = Region(folder / "twin.yaml", done.region.settings | {"store": str(folder / "twin")})
    twin.path.write_text(yaml.safe_dump(twin.settings))
    shutil.copytree(done.region.store, twin.store)
    return twin


def test_status_counts_tiles(done):
    result = run_here("status", done.region.path, *SMALL, "--json")
    assert json.loads(result.out)["steps"]["export"] == {"done": 12, "total": 12}


def test_a_small_zone_is_one_file(tmp_path, workers):
    made = make_map(tmp_path, grids=(DEGREES,))
    result = run_here("export", made.region.path, *workers)
    assert result.code == 0, result.err
    (path,) = files(made.region, "2021/height-*.tif")
    with rasterio.open(path) as found:
        np.testing.assert_array_equal(found.read(1), arrays(made.region.heights)["height"][0])
        np.testing.assert_allclose(found.transform, DEGREES.transform, rtol=0, atol=1e-9)


def test_ground_without_heights_has_no_file(tmp_path, workers):
    grid = replace(GRID, shape=(60, 80))
    made = make_map(tmp_path, grids=(grid,))  # its lake: rows 20 to 40, columns 30 to 60
    result = run_here("export", made.region.path, *workers, "--set", "export.tile=20")
    assert result.code == 0, result.err
    assert "24 shards done" in result.out
    assert len(files(made.region, "2021/height-*.tif")) == 12 - 1
    assert not files(made.region, "*r0000020-c0000040-*")
    found = json.loads((made.region.store / "export" / "collection.json").read_text())
    assert sum(link["rel"] == "item" for link in found["links"]) == 2 * 11 + 1
    assert run_here("verify", made.region.path, *workers).code == 0


# Which map.


@pytest.mark.slow
def test_a_calibrated_map_is_exported_where_asked(tmp_path, workers):
    made = make_map(tmp_path)
    asked = ("--set", "export.map=calibrated")
    refused = run_here("export", made.region.path, *workers, *asked)
    assert refused.code == 2
    one_message(refused.err, "there is no map", "run aeheight calibrate")
    assert (
        run_here("calibrate", made.region.path, "--points", made.points(count=100), *workers).code
        == 0
    )
    assert run_here("export", made.region.path, *workers, *asked).code == 0
    expected = arrays(made.calibrated)["height"][0]
    np.testing.assert_array_equal(assembled(made.region, "height", 2021), expected)
    other = run_here("export", made.region.path, *workers)
    assert other.code == 2
    one_message(other.err, "export.map: 'calibrated' -> 'heights'", "--overwrite")
    assert run_here("export", made.region.path, *workers, "--overwrite").code == 0
    expected = arrays(made.region.heights)["height"][0]
    np.testing.assert_array_equal(assembled(made.region, "height", 2021), expected)


# Interruption and damage.


@pytest.mark.slow
def test_a_killed_export_goes_on_where_it_was(done, tmp_path, command, workers):
    """The driver is killed in its midst; a rerun makes the rest, and every byte is as without."""
    made = make_map(tmp_path)
    settings = ("--set", "export.tile=40", "--set", "export.block=128")
    whole_map = ("export", str(made.region.path), *settings)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *whole_map, *workers], stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 60
    while len(made.region.receipts("export")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(made.region.receipts("export"))
    assert 3 <= finished < 40
    assert not (made.region.store / "export" / "collection.json").exists()
    result = run_here(*whole_map, *workers)
    assert result.code == 0, result.err
    before = int(result.out.split(" done before")[0].split()[-1])
    assert finished <= before < 40
    np.testing.assert_array_equal(
        assembled(made.region, "height", 2021), assembled(done.region, "height", 2021)
    )
    bytes_once = {path: path.read_bytes() for path in files(made.region, "*.tif")}
    assert run_here(*whole_map, *workers, "--overwrite").code == 0
    assert {path: path.read_bytes() for path in files(made.region, "*.tif")} == bytes_once


def test_damage_is_found_and_mended(done, tmp_path, workers):
    """A flipped byte, a lost file and a changed item, each in a tile of its own."""
    twin = twin_of(done, tmp_path)
    damaged = [
        files(twin, f"2022/{pattern}")[number]
        for number, pattern in enumerate(("height-*.tif", "novelty-*.tif", "r*.json"))
    ]
    data = [path.read_bytes() for path in damaged]
    flip(damaged[0])
    damaged[1].unlink()
    damaged[2].write_bytes(data[2].replace(b"2022", b"2023", 1))
    result = run_here("verify", twin.path, *workers)
    assert result.code == 1
    assert "export    13 shards checked, 3 damaged" in result.out
    assert all(path.name in result.out for path in damaged)
    assert "is missing" in result.out
    result = run_here("verify", twin.path, *workers, "--repair")
    assert result.code == 0, result.err
    assert "export    3 shards done" in result.out
    assert [path.read_bytes() for path in damaged] == data
    assert snapshot(twin.store / "export").keys() == snapshot(done.region.store / "export").keys()


# Bad input.


def test_there_must_be_a_whole_map(tmp_path, regions, workers):
    fresh = regions.write("fresh")
    result = run_here("export", fresh.path)
    assert result.code == 2
    one_message(result.err, "there is no map", "run aeheight predict")
    made = make_map(tmp_path)
    made.region.receipts("heights")[0].unlink()
    for plan in ([], ["--plan"]):
        result = run_here("export", made.region.path, *plan, *workers)
        assert result.code == 2
        one_message(result.err, "1 shards of the map are missing", "run aeheight predict")
    assert not (made.region.store / "export").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("export.crs=EPSG:99999", ["PROJ does not know", "EPSG:99999"]),
        ("export.crs=EPSG:5773", ["no horizontal CRS"]),
        ("export.resolution=30", ["give export.crs too"]),
        ("export.tile=0", ["export.tile"]),
        ("export.block=100", ["export.block"]),
        ("export.block=2048", ["export.block", "1024"]),
        ("export.crs=IAU_2015:30100", ["cannot be shown in IAU_2015:30100"]),
        ("export.tiles=100", ["export.tiles: unknown key; did you mean 'tile'?"]),
        ("export.tile=90", ["export.tile: 80 -> 90", "--overwrite"]),
    ],
)
def test_bad_settings_are_told(done, setting, words):
    for plan in ([], ["--plan"]):
        asked = SMALL if "export.tile=" not in setting else SMALL[2:]
        result = run_here("export", done.region.path, *plan, *asked, "--set", setting)
        assert result.code == 2
        one_message(result.err, *words)


def test_a_map_made_anew_is_not_mixed_with_the_old(tmp_path, workers):
    made = make_map(tmp_path)
    assert run_here("export", made.region.path, *SMALL, *workers).code == 0
    for folder in ("heights.zarr", "heights.receipts"):
        for path in sorted((made.region.store / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    make_map(tmp_path)
    result = run_here("export", made.region.path, *SMALL, *workers)
    assert result.code == 2
    one_message(result.err, "map: ", "--overwrite")
    told = run_here("status", made.region.path, *SMALL, "--json").out
    assert json.loads(told)["steps"]["export"] == {"done": 0, "total": 12}


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 9000), cols=st.integers(1, 9000), edge=st.integers(700, 5000),
)  # fmt: skip
def test_the_parts_of_a_picture_fill_it_once(rows, cols, edge):
    canvas = np.zeros(picture_cut((rows, cols), whole((rows, cols))).shape, np.uint8)
    assert max(canvas.shape) <= 1600
    for region in tile((rows, cols), edge):
        place = canvas[picture_cut((rows, cols), region).slices]
        place += 1
    assert canvas.all()
    assert (canvas > 1).mean() < 0.02  # slivers of less than a pixel of the picture


def test_receipts_know_what_a_tile_was_made_from(done):
    ledger = Ledger(Store.at(done.region.store / "export.receipts"))
    tree = open_tree(Store.at(done.region.heights))
    assert ledger.settings() == {
        "export": {"map": "heights", "tile": 80, "block": 128, "compress": "deflate"},
        "map": tree.identity,
    }
    done_ = dict.fromkeys(ledger.done())
    del done_["catalogue/once/static/r0000000-c0000000-1x1"]
    for receipt in ledger.receipts(done_):
        assert set(receipt.further) == {*LAYERS[1:], "item"}
        assert receipt.inputs
