"""The reference and the difference from it, beside a map's heights in the files of an export."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pystac
import pytest
import rasterio
from pyproj import CRS
from rio_cogeo.cogeo import cog_validate

from aeheight.cube import open_tree
from aeheight.receipts import Ledger, receipt_for
from aeheight.store import Store
from tests.runs import arrays, flip, one_message, run_here, snapshot
from tests.test_calibrate import EAST, WEST, Map, make_map, make_reference
from tests.test_export_step import SMALL, assembled, files, twin_of

LAYERS = {"height", "novelty", "spread", "reference", "difference"}
WITHOUT = ("--set", "export.reference=false")


@pytest.fixture(scope="module")
def workers(scheduler):
    """Where the commands of this file compute."""
    return "--scheduler", scheduler


@pytest.fixture(scope="module")
def done(tmp_path_factory, workers) -> Map:
    """A map with a reference, exported in tiles of 80 px; tests must leave it as it is."""
    made = make_map(tmp_path_factory.mktemp("exported"), reference=True)
    result = run_here("export", made.region.path, *SMALL, *workers)
    assert result.code == 0, result.err
    return made


def known(made: Map) -> np.ndarray:
    """The reference as it was ingested: the truth, but for the northernmost shards."""
    truth = made.truth["utm10n"].astype(np.float32)
    truth[:64] = np.nan
    return truth


def test_reference_and_difference_bit_for_bit(done):
    reference, heights = known(done), arrays(done.region.heights)["height"]
    for number, year in enumerate((2021, 2022)):
        np.testing.assert_array_equal(assembled(done.region, "reference", year), reference)
        np.testing.assert_array_equal(
            assembled(done.region, "difference", year), heights[number] - reference
        )
        np.testing.assert_array_equal(assembled(done.region, "height", year), heights[number])


def test_the_files_say_what_they_hold(done):
    for path in [*files(done.region, "reference-*.tif"), *files(done.region, "difference-*.tif")]:
        assert cog_validate(path, strict=True) == (True, [], [])
        with rasterio.open(path) as opened:
            tags, crs, units = opened.tags(), CRS.from_wkt(opened.crs.to_wkt()), opened.units
        assert units == ("metre",)
        if "reference" in path.name:
            assert [part.to_epsg() for part in crs.sub_crs_list] == [32610, 5703]
            assert (tags["SURFACE"], tags["VERTICAL_DATUM"]) == ("dtm", "EPSG:5703")
            assert (tags["EPOCH"], tags["TIFFTAG_COPYRIGHT"]) == ("2019", "The Survey")
            assert not {"CHECKPOINT", "YEAR"} & set(tags)
        else:
            assert crs.to_epsg() == 32610  # a difference is no height above anything
            assert (tags["SURFACE"], tags["VERTICAL_DATUM"]) == ("dsm", "EPSG:5773")
            assert tags["REFERENCE_SURFACE"] == "dtm"
            assert tags["REFERENCE_VERTICAL_DATUM"] == "EPSG:5703"
            assert tags["TIFFTAG_COPYRIGHT"].endswith("; The Survey")


def test_they_are_assets_of_the_tiles(done):
    folder = done.region.store / "export"
    for item in pystac.Collection.from_file(str(folder / "collection.json")).get_items():
        if item.id.endswith("-model"):
            continue
        # No reference north of row 64; the tiles have 80 rows.
        assert set(item.assets) == LAYERS
        assert item.assets["reference"].extra_fields["attribution"] == "The Survey"
        assert item.assets["difference"].extra_fields["attribution"] == "The Survey"
        assert "attribution" not in item.assets["height"].extra_fields


def test_a_tile_without_a_reference_has_the_maps_layers_only(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    shutil.rmtree(twin.store / "export")
    shutil.rmtree(twin.store / "export.receipts")
    tile = ("--set", "export.tile=60", "--set", "export.block=128")
    result = run_here("export", twin.path, *workers, *tile)
    assert result.code == 0, result.err
    for path in files(twin, "r*.json"):
        item = json.loads(path.read_text())
        north = path.name.startswith("r0000000")
        assert set(item["assets"]) == (LAYERS - {"reference", "difference"} if north else LAYERS)
    np.testing.assert_array_equal(assembled(twin, "reference", 2021), known(done))


def test_a_licence_may_forbid_copies(tmp_path, workers):
    made = make_map(tmp_path, reference=True)
    result = run_here("export", made.region.path, *SMALL, *workers, *WITHOUT)
    assert result.code == 0, result.err
    assert not files(made.region, "reference-*") + files(made.region, "difference-*")
    refused = run_here("export", made.region.path, *SMALL, *workers)
    assert refused.code == 2
    one_message(refused.err, "export.reference: False -> None", "--overwrite")
    assert run_here("status", made.region.path, *SMALL).out.count("12 of 12 tiles, done") == 1
    heights = files(made.region, "2021/height-*.tif")[0]
    flip(heights)
    assert run_here("verify", made.region.path, *workers, "--repair").code == 0
    assert not files(made.region, "reference-*")


def test_a_cube_that_is_given_a_reference_later(tmp_path, workers):
    """And one that loses it: files of a reference that is gone do not stay."""
    made = make_map(tmp_path, reference=True)
    aside = tmp_path / "aside"
    made.region.cube.rename(aside)
    assert run_here("export", made.region.path, *SMALL, *workers).code == 0
    assert not files(made.region, "reference-*")
    heights = {path: path.read_bytes() for path in files(made.region, "height-*.tif")}
    aside.rename(made.region.cube)
    result = run_here("export", made.region.path, *SMALL, *workers)
    assert "12 shards done" in result.out
    assert len(files(made.region, "reference-*.tif")) == 12
    assert {path: path.read_bytes() for path in files(made.region, "height-*.tif")} == heights
    shutil.rmtree(made.region.cube)
    assert "12 shards done" in run_here("export", made.region.path, *SMALL, *workers).out
    assert not files(made.region, "reference-*") + files(made.region, "difference-*")
    assert run_here("verify", made.region.path, *workers).code == 0


def test_one_shard_of_the_reference_made_anew_makes_its_tiles_anew(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    cube = open_tree(Store.at(twin.cube))
    ledger = Ledger(Store.at(twin.store / "cube.receipts"))
    (shard,) = [s for s in cube.template.shards("height") if s.region.name.endswith("22x8")]
    values, later = np.full((22, 8), 7, np.float32), replace(shard, inputs="later")
    digest = cube.write(later, values)
    ledger.forget([shard.name])
    early = run_here("export", twin.path, *SMALL, *workers)
    assert early.code == 2
    one_message(early.err, "1 shards of the reference are missing", "run aeheight ingest")
    ledger.leave(receipt_for(later, values, digest, values > 0, ledger.current().key, 0.0))
    result = run_here("export", twin.path, *SMALL, *workers)
    assert "2 shards done" in result.out  # one a year
    assert "10 done before" in result.out
    assert (assembled(twin, "reference", 2022)[128:, 192:] == 7).all()


def test_the_reference_of_another_cube_is_refused(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    shutil.rmtree(twin.cube)
    shutil.rmtree(twin.store / "cube.receipts")
    make_reference(twin, done.grids(), 64)
    for plan in ([], ["--plan"]):
        result = run_here("export", twin.path, *SMALL, *workers, *plan)
        assert result.code == 2
        one_message(result.err, "made anew", "predict --overwrite", "export.reference=false")
    told = json.loads(run_here("status", twin.path, *SMALL, "--json").out)
    assert told["steps"]["export"] == {"done": 0, "total": 12}


def test_damage_to_them_is_found_and_mended(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    damaged = [
        files(twin, f"2022/{name}-*.tif")[n] for n, name in enumerate(("reference", "difference"))
    ]
    data = [path.read_bytes() for path in damaged]
    flip(damaged[0])
    damaged[1].unlink()
    result = run_here("verify", twin.path, *workers, "--repair")
    assert "export    13 shards checked, 2 damaged" in result.out
    assert [path.read_bytes() for path in damaged] == data


def test_the_mosaic_holds_the_maps_own_layers(tmp_path, workers):
    made = make_map(tmp_path, grids=(WEST, EAST), reference=True)
    crs = ("--set", "export.crs=EPSG:3310")
    plan = json.loads(run_here("export", made.region.path, *crs, "--plan", "--json").out)
    result = run_here("export", made.region.path, *workers, *crs)
    assert result.code == 0, result.err
    found = {path.name.split("-")[0] for path in files(made.region, "mosaic-*/2021/*.tif")}
    assert found == LAYERS - {"reference", "difference"}
    assert {path.name.split("-")[0] for path in files(made.region, "utm11n/2021/*.tif")} == LAYERS
    assert plan["files"] == len(files(made.region, "*.tif"))
    before = snapshot(made.region.store / "export")
    assert "0 shards done" in run_here("export", made.region.path, *workers, *crs).out
    assert snapshot(made.region.store / "export") == before
