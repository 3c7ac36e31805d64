"""Zarr pyramids of an export: their pixels, their shards, and what other programs read of them."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr_cm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from hypothesis.extra.numpy import arrays as some_arrays
from pyproj import CRS

from aeheight.conventions import coordinates
from aeheight.grid import Grid
from aeheight.pyramid import Pyramid, halved
from aeheight.steps.pyramids import stages
from aeheight.template import Layer
from aeheight.windows import tile
from tests.runs import arrays, flip, run_here, snapshot
from tests.test_calibrate import Map, make_map
from tests.test_export_step import files, twin_of

LARGE = Grid("EPSG:32610", 10.0, 540000.0, 4280000.0, (601, 803))
SMALL = ("--set", "export.tile=256", "--set", "export.block=128", "--set", "export.pyramids=true")
"""Squares of 256 px: three stages, of the levels 0 and 1, 2, and 3."""
HEIGHT = Layer("height", "float32", np.nan, timed=True)


@pytest.fixture(scope="module")
def workers(scheduler):
    """Where the commands of this file compute."""
    return "--scheduler", scheduler


@pytest.fixture(scope="module")
def done(tmp_path_factory, workers) -> Map:
    """A map with pyramids; tests must leave it as it is."""
    made = make_map(tmp_path_factory.mktemp("pyramids"), grids=(LARGE,), shard=256, reference=True)
    result = run_here("export", made.region.path, *SMALL, *workers)
    assert result.code == 0, result.err
    return made


def pyramids(region) -> Path:
    return region.store / "export" / "pyramids.zarr"


def half(values: np.ndarray) -> np.ndarray:
    """Means of the known among four pixels, by brute force."""
    rows, cols = (-(-size // 2) for size in values.shape)
    out = np.full((rows, cols), np.nan, np.float32)
    for row, col in np.ndindex(rows, cols):
        four = values[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        if np.isfinite(four).any():
            out[row, col] = np.float32(np.mean(four[np.isfinite(four)], dtype=np.float64))
    return out


def coarser(values: np.ndarray) -> np.ndarray:
    """The same by xarray, of (years,) rows and columns."""
    exact = xr.DataArray(values.astype(np.float64))
    rows, cols = exact.dims[-2:]
    means = exact.coarsen({rows: 2, cols: 2}, boundary="pad").mean()
    return means.to_numpy().astype(np.float32)


# Pixels and geometry.


@settings(max_examples=100, deadline=None)
@given(
    values=some_arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.one_of(st.just(np.nan), st.floats(-500, 9000, width=32)),
    )
)
def test_halves_are_means_of_what_is_known(values):
    np.testing.assert_array_equal(halved(values), half(values))


def test_strips_leave_no_trace(monkeypatch):
    values = np.random.default_rng(0).normal(size=(131, 70)).astype(np.float32)
    whole = halved(values)
    monkeypatch.setattr("aeheight.pyramid._STRIP", 2)
    np.testing.assert_array_equal(halved(values), whole)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5000), cols=st.integers(1, 5000), chunk=st.sampled_from([16, 32]),
    steps=st.integers(1, 4),
)  # fmt: skip
def test_every_shard_of_every_level_has_one_owner(rows, cols, chunk, steps):
    grid = Grid("EPSG:32610", 10.0, 540000.0, 4280000.0, (rows, cols))
    pyramid = Pyramid((grid,), (HEIGHT,), (2021,), chunk, steps, "")
    levels = pyramid.levels(grid)
    assert max(levels[-1].shape) <= chunk
    assert len(levels) == 1 or max(levels[-2].shape) > chunk
    made = [level for stage in pyramid.stages(grid) for level in stage]
    assert made == list(range(len(levels)))
    found = stages(pyramid, lambda zone, region: True, lambda zone, year, region: [])
    for stage, shards in zip(pyramid.stages(grid), found, strict=True):
        for level in stage:
            edge, above = pyramid.shard(level), int(shards[0].layer.removeprefix("level"))
            assert edge % chunk == 0
            assert edge << (level - above) == pyramid.tile
            corners = [(s.region.row >> (level - above), s.region.col >> (level - above))
                       for s in shards]  # fmt: skip
            wanted = [(r.row, r.col) for r in tile(levels[level].shape, edge)]
            assert corners == wanted


def test_levels_are_the_map_and_its_halves(done):
    heights = arrays(done.region.heights)
    truth = done.truth["utm10n"].astype(np.float32)
    truth[:256] = np.nan
    wanted = {
        **heights, "reference": truth, "difference": heights["height"] - truth,
    }  # fmt: skip
    for level in range(4):
        with xr.open_zarr(pyramids(done.region), group=f"utm10n/{level}") as found:
            assert set(found.data_vars) == set(wanted)
            for name, values in wanted.items():
                np.testing.assert_array_equal(found[name].to_numpy(), values)
        wanted = {name: coarser(values) for name, values in wanted.items()}
    assert not (pyramids(done.region) / "utm10n" / "4").exists()


def test_ground_without_heights_is_left_out():
    """Squares of later stages are made only where the map has shards below them."""
    pyramid = Pyramid((replace(LARGE, shape=(4096, 4096)),), (HEIGHT,), (2021,), 128, 1, "")
    found = stages(pyramid, lambda zone, r: r.row == 0 and r.col >= 2048, lambda *_: [])
    assert [len(stage) for stage in found] == [8, 4, 2, 1, 1]
    assert {shard.region.row for stage in found for shard in stage} == {0}


# What others read.


def test_xarray_opens_each_level_and_all(done):
    with xr.open_datatree(pyramids(done.region), engine="zarr") as tree:
        for level in range(4):
            group = tree[f"utm10n/{level}"]
            width = 10 * 2**level
            assert group["x"].to_numpy()[:2] == pytest.approx(
                [540000 + width / 2, 540000 + 1.5 * width]
            )
            assert group["y"].to_numpy()[0] == 4280000 - width / 2
            assert str(group["time"].to_numpy()[1])[:10] == "2022-01-01"
            assert group["height"].attrs["vertical_datum"] == "EPSG:5773"
            assert group["reference"].dims == ("y", "x")


@pytest.mark.filterwarnings("ignore:Use `@` matmul")  # odc-geo of affine
def test_rioxarray_and_odc_geo_see_the_crs(done):
    import odc.geo.xr  # noqa: F401, PLC0415
    import rioxarray  # noqa: F401, PLC0415

    for level in (0, 2):
        with xr.open_zarr(pyramids(done.region), group=f"utm10n/{level}") as found:
            heights = found["height"]
            assert heights.rio.crs.to_epsg() == 32610
            assert heights.rio.resolution() == (10 * 2**level, -10 * 2**level)
            assert np.isnan(heights.rio.nodata)
            box = heights.odc.geobox
            assert box.crs.epsg == 32610
            assert (box.transform.c, box.transform.f) == (540000, 4280000)
            assert box.resolution.x == 10 * 2**level


def test_the_conventions_are_kept(done):
    """Multiscales, proj and spatial, by the models of the conventions' own package."""
    zone = json.loads((pyramids(done.region) / "utm10n" / "zarr.json").read_text())
    assert set(zarr_cm.detect_revisions(zone["attributes"])) == {"multiscales", "proj", "spatial"}
    for convention in (zarr_cm.multiscales, zarr_cm.proj, zarr_cm.spatial):
        convention.validate_group_metadata(zone)
    for level in range(4):
        group = json.loads((pyramids(done.region) / f"utm10n/{level}/zarr.json").read_text())
        assert set(zarr_cm.detect_revisions(group["attributes"])) == {"proj", "spatial"}
        zarr_cm.validate_all(group["attributes"])
    del zone["attributes"]["multiscales"]["layout"][1]["transform"]
    with pytest.raises(ValueError, match="transform"):  # it does look
        zarr_cm.multiscales.validate_group_metadata(zone)


def test_multiscales_say_how_the_levels_lie(done):
    about = json.loads((pyramids(done.region) / "utm10n" / "zarr.json").read_text())["attributes"]
    names = {each["name"]: each for each in about["zarr_conventions"]}
    assert names["multiscales"]["uuid"] == "d35379db-88df-4056-af3a-620245f8e347"
    assert set(names["multiscales"]) == {"schema_url", "spec_url", "uuid", "name", "description"}
    assert about["proj:code"] == "EPSG:32610"
    layout = about["multiscales"]["layout"]
    assert [each["asset"] for each in layout] == ["0", "1", "2", "3"]
    assert "derived_from" not in layout[0]
    for finer, coarser in pairwise(layout):
        assert coarser["derived_from"] == finer["asset"]
        assert coarser["transform"] == {"scale": [2.0, 2.0], "translation": [0.0, 0.0]}
    for level, each in enumerate(layout):
        with xr.open_zarr(pyramids(done.region), group=f"utm10n/{level}") as found:
            assert each["spatial:shape"] == list(found["reference"].shape)
            assert each["spatial:transform"][0] == float(found["x"][1] - found["x"][0])
            assert found["height"].encoding["chunks"] == (1, 128, 128)
    found = json.loads((done.region.store / "export" / "collection.json").read_text())
    assert found["assets"]["pyramids"]["href"] == "./pyramids.zarr"
    assert CRS.from_wkt(
        json.loads((pyramids(done.region) / "utm10n/1/spatial_ref/zarr.json").read_text())[
            "attributes"
        ]["spatial_ref"]
    ).to_epsg() == 32610  # fmt: skip


@pytest.mark.parametrize(
    ("crs", "units", "metres"),
    [("EPSG:32610", "m", 1.0), ("EPSG:2227", "US_survey_foot", 1200 / 3937),
     ("EPSG:2222", "international_foot", 0.3048), ("EPSG:27200", "m", 1.0),
     ("EPSG:24370", "0.9143985307444408 m", 0.9143985307444408)],
)  # fmt: skip
def test_coordinates_have_the_unit_of_their_crs(crs, units, metres):
    """Survey feet, feet, yards: by the names of UDUNITS, which CF takes."""
    assert CRS.from_user_input(crs).axis_info[0].unit_conversion_factor == pytest.approx(metres)
    told = {each.name: each.attributes for each in coordinates(replace(LARGE, crs=crs), (), ())}
    assert (told["x"]["units"], told["y"]["units"]) == (units, units)


# Interruption, damage, change.


def test_a_rerun_writes_nothing_and_the_plan_neither(done, workers):
    before = snapshot(done.region.store / "export")
    again = run_here("export", done.region.path, *SMALL, *workers)
    assert "0 shards done" in again.out
    plain = [word for word in SMALL if "pyramids" not in word and word != "--set"]
    kept = run_here(
        "export", done.region.path, *workers, "--plan", "--json",
        *(part for word in plain for part in ("--set", word)),
    )  # fmt: skip
    plan = json.loads(kept.out)
    assert plan["pending"] == 0
    assert plan["pyramids"] == "pyramids.zarr, from squares of 256 px"
    assert snapshot(done.region.store / "export") == before


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bytes(done, tmp_path, command, workers):
    twin = twin_of(done, tmp_path)
    for name in ("export", "export.receipts"):
        shutil.rmtree(twin.store / name)
    process = subprocess.Popen(
        [*command, "export", str(twin.path), *SMALL, *workers], stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while squares(twin) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= squares(twin) < squares(done.region)
    result = run_here("export", twin.path, *SMALL, *workers)
    assert result.code == 0, result.err
    assert objects(twin) == objects(done.region)
    assert run_here("verify", twin.path, *workers).code == 0


def squares(region) -> int:
    """How many squares have a receipt."""
    folders = (region.store / "export.receipts").glob("*/pyramids-*")
    return sum(len([*folder.rglob("r*.json")]) for folder in folders)


def objects(region) -> dict[str, bytes]:
    """Everything in the pyramids."""
    root = pyramids(region)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_damage_is_found_and_mended(done, tmp_path, workers):
    """At the finest level and at the coarsest; also where the setting is not given again."""
    twin = twin_of(done, tmp_path)
    flip(pyramids(twin) / "utm10n/0/height/c/1/1/2")
    (pyramids(twin) / "utm10n/3/reference/c/0/0").unlink()
    found = run_here("verify", twin.path, *workers)
    assert found.code == 1
    assert "2 damaged" in found.out
    assert "pyramids.zarr/utm10n/3/reference/c/0/0 is missing" in found.out
    result = run_here("verify", twin.path, *workers, "--repair")
    assert result.code == 0, result.err
    assert objects(twin) == objects(done.region)


def test_pyramids_can_be_added_and_follow_the_layers(tmp_path, workers):
    """And a reference that is gone takes its levels with it."""
    made = make_map(tmp_path, reference=True)
    plain = ("--set", "export.tile=128", "--set", "export.block=128")
    assert run_here("export", made.region.path, *plain, *workers).code == 0
    before = {path: path.stat().st_mtime_ns for path in files(made.region, "*.tif")}
    added = run_here("export", made.region.path, *plain, "--set", "export.pyramids=true", *workers)
    assert added.code == 0, added.err
    assert {path: path.stat().st_mtime_ns for path in files(made.region, "*.tif")} == before
    assert (pyramids(made.region) / "utm10n/1/reference/c").exists()
    collection = json.loads((made.region.store / "export" / "collection.json").read_text())
    assert "pyramids" in collection["assets"]
    shutil.rmtree(made.region.cube)
    assert run_here("export", made.region.path, *plain, *workers).code == 0
    assert not list(pyramids(made.region).rglob("reference"))
    assert run_here("verify", made.region.path, *workers).code == 0
    assert run_here("export", made.region.path, *plain, "--overwrite", *workers).code == 0
    assert not pyramids(made.region).exists()
