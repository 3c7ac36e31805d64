"""STAC of an export against JSON schemas: the core's from pystac, the extensions' by hand.

No package carries the extensions' schemas. Where AEHEIGHT_STAC_SCHEMAS names a folder that holds
copies of them, by their path on the web (`projection/v2.0.0/schema.json`), they are used too.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from pyproj import CRS
from pystac.validation.local_validator import get_local_schema_cache
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from aeheight.catalogue import File, tile_item
from aeheight.grid import Grid
from tests.exports import ORIGIN
from tests.runs import run_here
from tests.test_calibrate import EAST, WEST, Map, make_map
from tests.test_export_step import files

SITE = "https://stac-extensions.github.io/"
FOLDER = os.environ.get("AEHEIGHT_STAC_SCHEMAS")
CORE = "https://schemas.stacspec.org/v1.1.0/{0}-spec/json-schema/{0}.json"
KINDS = {"Feature": "item", "Collection": "collection"}

OWN = {"aeheight", "classification"}
"""Prefixes that need no extension: ours, and one that MLM requires inside of its output."""


@pytest.fixture(scope="module")
def done(tmp_path_factory, scheduler) -> Map:
    """An export of two zones with all that it can hold."""
    made = make_map(tmp_path_factory.mktemp("schemas"), grids=(WEST, EAST), reference=True)
    asked = ("--set", "export.crs=EPSG:3310", "--set", "export.pyramids=true")
    result = run_here("export", made.region.path, *asked, "--scheduler", scheduler)
    assert result.code == 0, result.err
    return made


def documents(made: Map) -> dict[str, Any]:
    """Every STAC file of an export."""
    names = ("collection.json", "model.json", "r*.json")
    paths = [path for name in names for path in files(made.region, name)]
    return {str(path): json.loads(path.read_text()) for path in paths if ".zarr" not in str(path)}


def schemas() -> dict[str, Any]:
    """By address: pystac's, and the copies that there are."""
    known: dict[str, Any] = dict(get_local_schema_cache())
    if FOLDER:
        for path in Path(FOLDER).rglob("schema.json"):
            known[SITE + path.relative_to(FOLDER).as_posix()] = json.loads(path.read_text())
    return known


def wrong(document: Any, address: str) -> list[str]:
    """What a schema finds wrong."""
    known = schemas()
    resources = ((at, Resource.from_contents(one, DRAFT7)) for at, one in known.items())
    validator = Draft7Validator(known[address], registry=Registry().with_resources(resources))
    return [f"{[*error.path]}: {error.message}" for error in validator.iter_errors(document)]


def test_the_core_is_valid(done):
    found = documents(done)
    assert len(found) == 2 * 2 + 2 + 2
    for path, document in found.items():
        assert not wrong(document, CORE.format(KINDS[document["type"]])), path


@pytest.mark.skipif(not FOLDER, reason="needs AEHEIGHT_STAC_SCHEMAS: copies of the schemas")
def test_the_extensions_are_valid(done):
    seen = set()
    for path, document in documents(done).items():
        for address in document["stac_extensions"]:
            assert not wrong(document, address), path
            seen.add(address.removeprefix(SITE).split("/")[0])
    assert seen == {"projection", "raster", "file", "processing", "mlm"}


LAEA = CRS.from_user_input("+proj=laea +lat_0=45 +lon_0=-120 +datum=WGS84 +units=m").to_wkt()
PLACES = {
    "EPSG:32610": Grid("EPSG:32610", 10.0, 540000.0, 4280000.0, (60, 80)),
    "ESRI:54009": Grid("ESRI:54009", 10.0, -1e7, 4.6e6, (60, 80)),
    "EPSG:4326": Grid("EPSG:4326", 0.0001, -120.0, 60.0, (60, 80)),
    "EPSG:2227": Grid("EPSG:2227", 32.8, 6e6, 2e6, (60, 80)),
    LAEA: Grid(LAEA, 10.0, 0.0, 0.0, (60, 80)),
}


@pytest.mark.parametrize("crs", PLACES, ids=["utm", "esri", "degrees", "feet", "wkt"])
def test_an_item_says_where_it_lies_in_any_crs(crs):
    """By projection v2.0.0: a code, or WKT2 where there is none; by raster v1.1.0: metres."""
    grid = PLACES[crs]
    file = File("height.tif", "height", "metre", 1, "0" * 64, {"mean": 1.0})
    item = json.loads(tile_item("one", grid, 2021, {"height": file}, ORIGIN, "../.."))
    assert not wrong(item, CORE.format("item"))
    told = item["properties"]
    if crs == LAEA:
        assert told["proj:code"] is None
        assert CRS.from_wkt(told["proj:wkt2"]) == CRS.from_wkt(LAEA)
    else:
        assert told["proj:code"] == crs
        assert re.fullmatch(r"[A-Z]+:\d+", crs)
        assert "proj:wkt2" not in told
    (band,) = item["assets"]["height"]["raster:bands"]
    assert band["spatial_resolution"] == pytest.approx(METRES.get(crs, 10.0), rel=2e-3)
    if FOLDER:
        for address in item["stac_extensions"]:
            assert not wrong(item, address)


METRES = {"EPSG:4326": (11.13 + 11.13 / 2) / 2, "EPSG:2227": 32.8 * 1200 / 3937}
"""Mean edge of a pixel: at 60° north a degree of longitude is half of one of latitude."""


def test_every_prefix_is_declared(done):
    """A field of an extension says nothing where the extension is not named, and the reverse."""
    for path, document in documents(done).items():
        named = {
            address.removeprefix(SITE).split("/")[0] for address in document["stac_extensions"]
        }
        text = json.dumps({key: document[key] for key in document if key != "stac_extensions"})
        used = set(re.findall(r'"([a-z]+):[a-z0-9_]+":', text)) - OWN
        short = {"projection": "proj"}
        assert used == {short.get(name, name) for name in named}, path


def test_the_rules_that_schemas_would_hold(done):
    """Of projection v2.0.0, raster v1.1.0, file v2.1.0, processing v1.2.0 and MLM v1.4.0."""
    for document in documents(done).values():
        told = document.get("properties", {})
        if "proj:code" in told:
            assert re.fullmatch(r"[A-Z]+:\d+", told["proj:code"])
            assert [len(told[f"proj:{name}"]) for name in ("shape", "bbox", "transform")] == [
                2, 4, 6,
            ]  # fmt: skip
            assert all(isinstance(size, int) and size > 0 for size in told["proj:shape"])
        if "processing:level" in told:
            assert re.fullmatch(r"L[0-6]\w*", told["processing:level"])
            assert all(isinstance(v, str) for v in told["processing:software"].values())
        for asset in document["assets"].values():
            if "file:checksum" in asset:
                assert re.fullmatch(r"1220[0-9a-f]{64}", asset["file:checksum"])
                assert asset["file:size"] > 0
            for band in asset.get("raster:bands", []):
                assert band["data_type"] == "float32"
                assert band["nodata"] == "nan"
                assert band["sampling"] in ("area", "point")
                assert set(band["statistics"]) <= {
                    "mean", "minimum", "maximum", "stddev", "valid_percent",
                }  # fmt: skip
    (model,) = [d for d in documents(done).values() if "mlm:name" in d.get("properties", {})]
    told = model["properties"]
    assert set(told["mlm:tasks"]) == {"regression"}
    for one in told["mlm:input"]:
        assert {"name", "bands", "input"} <= set(one)
        assert {"shape", "dim_order", "data_type"} <= set(one["input"])
        assert len(one["input"]["shape"]) == len(one["input"]["dim_order"])
    for one in told["mlm:output"]:
        assert {"name", "tasks", "result"} <= set(one)
    assert [asset["roles"] for asset in model["assets"].values()] == [["mlm:model"]]
