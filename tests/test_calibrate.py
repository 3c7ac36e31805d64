"""The command `calibrate`: maps of known bias, corrected shard by shard, or left alone."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from pyproj import Transformer

from aeheight.cube import Tree, create, open_tree
from aeheight.grid import Grid
from aeheight.receipts import Ledger, receipt_for
from aeheight.settings import CubeSettings
from aeheight.steps.places import bilinear, map_at, plane_of
from aeheight.store import Store
from aeheight.template import Layer, Template
from tests.checkpoints import checkpoint_of
from tests.runs import Region, Regions, arrays, flip, one_message, run_here, snapshot, whole_shards

GRID = Grid("EPSG:32610", 10.0, 540000.0, 4280000.0, (150, 200))
WEST = Grid("EPSG:32610", 100.0, 750000.0, 4280000.0, (120, 120))
EAST = Grid("EPSG:32611", 100.0, 230000.0, 4280000.0, (120, 120))
SPREAD = 3.29
"""Metres: what 90 % of the map's own noise, of 2 m, lies within."""
DEGREES = Grid("EPSG:4326", 0.001, -124.0, 39.0, (150, 200))


def land(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """True heights anywhere, metres: hills a few kilometres wide."""
    return 300 + 150 * np.sin(lon * 400) * np.cos(lat * 300)


def lacking(lon: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """What a map that regresses to the mean, and tilts, is short of; metres."""
    return 6 + 0.15 * (truth - 300) + 400 * (lon - -122.53)


@dataclass(frozen=True)
class Map:
    """A finished map of known bias, and the region file that it is of."""

    region: Region
    truth: dict[str, np.ndarray]
    """By group, metres."""

    def points(
        self, name: str = "points.csv", count: int = 300, seed: int = 0, **rows: Any
    ) -> Path:
        """A file of true heights somewhere on the map, every twentieth of them gross."""
        rng = np.random.default_rng(seed)
        lon, lat = (np.concatenate(axis) for axis in zip(*map(degrees, self.grids()), strict=True))
        chosen = rng.choice(len(lon), count, replace=False)
        lon, lat = lon[chosen], lat[chosen]
        height = land(lon, lat) + rng.normal(0, 0.5, count)
        height[::20] += 400
        path = self.region.path.parent / name
        lines = [
            f"{x!r},{y!r},{z!r},0.5,EPSG:5773"
            for x, y, z in zip(*map(np.ndarray.tolist, (lon, lat, height)), strict=True)
        ]
        path.write_text("\n".join(["lon,lat,height,sigma,datum", *lines]) + "\n")
        return path

    def grids(self) -> tuple[Grid, ...]:
        return open_tree(Store.at(self.region.heights)).template.grids

    @property
    def calibrated(self) -> Path:
        return self.region.store / "calibrated.zarr"

    def result(self) -> dict[str, Any]:
        return json.loads((self.region.store / "calibration" / "calibration.json").read_text())


def degrees(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of all pixel centres, flat."""
    to_degrees = Transformer.from_crs(grid.crs, 4326, always_xy=True)
    lon, lat = to_degrees.transform(*np.meshgrid(grid.x(), grid.y()))
    return lon.ravel(), lat.ravel()


def make_map(
    folder: Path, grids=(GRID,), bias=lacking, shard=64, name="made", reference=False
) -> Map:
    """A map with novelty and spread beside its heights, and a lake without any of them.

    With `reference`, there is a cube beside it: the truth, but for the row of shards in the north.
    """
    cut = CubeSettings(shard=shard, chunk=32)
    about = {"units": "m", "surface": "dsm", "vertical_datum": "EPSG:5773"}
    layers = (
        Layer("height", "float32", np.nan, timed=True, attributes=about),
        Layer("novelty", "float32", np.nan, timed=True, attributes={"units": "1"}),
        Layer("spread", "float32", np.nan, timed=True, attributes={"long_name": "half width"}),
    )
    template = Template(tuple(grids), layers, (2021, 2022), cut, "made heights")
    base = {"embeddings": {"href": "none.tif", "year": [2021, 2022]}}
    region = Regions(folder, base).write(name)
    tree = create(Store.at(region.heights), template)
    cube = make_reference(region, grids, shard) if reference else None
    settings = {"heights": tree.identity} | ({"cube": cube.identity} if cube else {})
    ledger = Ledger(Store.at(region.store / "heights.receipts")).begin(settings)
    ledger.store.write("model.ckpt", checkpoint_of().to_bytes())
    truth, rng = {}, np.random.default_rng(0)
    for grid in grids:
        lon, lat = degrees(grid)
        heights = land(lon, lat)
        told = (heights - bias(lon, heights)).reshape(grid.shape) + rng.normal(0, 2, grid.shape)
        told[20:40, 30:60] = np.nan
        truth[grid.name] = heights.reshape(grid.shape)
        for shard_ in (s for s in template.shards("height") if s.group == grid.name):
            values = told[shard_.region.slices].astype(np.float32)
            beside = {"novelty": 0.5, "spread": SPREAD}
            further = {
                name: tree.write(
                    replace(shard_, layer=name),
                    np.where(np.isnan(values), values, np.float32(value)),
                )
                for name, value in beside.items()
            }
            digest = tree.write(shard_, values)
            receipt = receipt_for(shard_, values, digest, ~np.isnan(values), ledger.key, 0.0)
            ledger.leave(replace(receipt, further=further))
    return Map(region, truth)


def make_reference(region: Region, grids: tuple[Grid, ...], shard: int) -> Tree:
    """A cube of true heights; none in the northernmost shards."""
    about = {
        "long_name": "reference height of the terrain", "units": "m", "surface": "dtm",
        "vertical_datum": "EPSG:5703", "epoch": "2019", "attribution": "The Survey",
    }  # fmt: skip
    layers = (Layer("height", "float32", np.nan, attributes=about),)
    template = Template(tuple(grids), layers, (2021, 2022), CubeSettings(shard=shard, chunk=32), "")
    tree = create(Store.at(region.cube), template)
    ledger = Ledger(Store.at(region.store / "cube.receipts")).begin({"cube": tree.identity})
    truth = {grid.name: land(*degrees(grid)).reshape(grid.shape) for grid in grids}
    for each in template.shards("height"):
        values = truth[each.group][each.region.slices].astype(np.float32)
        values[:] = np.nan if each.region.row == 0 else values
        digest = tree.write(each, values)
        ledger.leave(receipt_for(each, values, digest, ~np.isnan(values), ledger.key, 0.0))
    return tree


@pytest.fixture(scope="module")
def workers(scheduler):
    """Where the commands of this file compute."""
    return "--scheduler", scheduler


@pytest.fixture(scope="module")
def done(tmp_path_factory, workers) -> Map:
    """A map that was corrected; tests must leave it as it is."""
    made = make_map(tmp_path_factory.mktemp("done"))
    result = run_here("calibrate", made.region.path, "--points", made.points(), *workers)
    assert result.code == 0, result.err
    return made


def rmse(difference: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(difference**2)))


# What is made.


def test_a_map_of_known_bias_is_corrected(done):
    before, after = arrays(done.region.heights), arrays(done.calibrated)
    truth = done.truth["utm10n"]
    for year in range(2):
        assert rmse(before["height"][year] - truth) > 13
        assert rmse(after["height"][year] - truth) < 2.5  # the map's own noise is 2 m
        assert abs(np.nanmedian(after["height"][year] - truth)) < 0.5
    np.testing.assert_array_equal(np.isnan(after["height"]), np.isnan(before["height"]))
    np.testing.assert_array_equal(after["novelty"], before["novelty"])
    assert whole_shards(done.region, "calibrated") == 2 * 12


def test_the_result_can_be_traced(done):
    found = done.result()
    assert found["points"]["rows"] == 300
    assert found["points"]["datums"] == {"EPSG:5773": 300}
    trial, dropped = found["trial"], found["points"]["dropped"]
    (outliers,) = (count for why, count in dropped.items() if why.startswith("outliers"))
    assert outliers == trial["outliers"] <= 15
    assert sum(dropped.values()) + trial["before"]["n"] == 300
    assert trial["before"]["rmse"] > 13 > 3 > trial["after"]["rmse"]
    assert trial["gain_rmse"] > 5 * trial["gain_rmse_error"] > 0
    assert found["map"] == {"year": 2021, "surface": "dsm", "vertical_datum": "EPSG:5773"}
    attributes = open_tree(Store.at(done.calibrated)).template.layer("height").attributes
    assert attributes["long_name"] == "predicted height, corrected by reference heights"
    assert attributes["vertical_datum"] == "EPSG:5773"


def test_what_the_spread_holds_is_told_before_and_after(done, workers):
    """The map's bias is no part of its spread; what the correction leaves is."""
    points = np.genfromtxt(
        done.region.path.parent / "points.csv", delimiter=",", names=True, usecols=(0, 1, 2)
    )
    keep = np.arange(len(points)) % 20 > 0
    tree = open_tree(Store.at(done.region.heights))
    off = map_at(tree, 2021, points["lon"], points["lat"]) - points["height"]
    allowed = np.hypot(SPREAD, 1.6449 * 0.5)
    trial = done.result()["trial"]
    wanted = np.mean(np.abs(off[keep & ~np.isnan(off)]) <= allowed)
    assert trial["within_before"] == pytest.approx(wanted, abs=1e-6)
    assert wanted < 0.5
    normal = 2 * NormalDist(0, trial["after"]["rmse"]).cdf(allowed) - 1
    assert trial["within_after"] == pytest.approx(normal, abs=0.05)
    assert normal > 0.8
    path = done.region.path.parent / "points.csv"
    told = run_here("calibrate", done.region.path, "--points", path, "--plan", *workers).out
    shares = (f"{100 * trial[name]:.0f}" for name in ("within_before", "within_after"))
    assert f"holds {' -> '.join(shares)} % of the points, and should hold 90 %" in told


def test_the_spread_stays_as_it_is_and_says_of_what(done):
    before, after = (open_tree(Store.at(path)) for path in (done.region.heights, done.calibrated))
    np.testing.assert_array_equal(
        arrays(done.calibrated)["spread"], arrays(done.region.heights)["spread"]
    )
    named = [tree.template.layer("spread").attributes["long_name"] for tree in (before, after)]
    assert named == ["half width", "half width, of the heights before the correction"]


def test_the_plan_shows_the_gain_and_writes_nothing(tmp_path):
    made = make_map(tmp_path)
    points, before = made.points(), snapshot(made.region.store)
    result = run_here("calibrate", made.region.path, "--points", points, "--plan")
    assert result.code == 0, result.err
    assert snapshot(made.region.store) == before
    for word in ("RMSE", "a gain of", "shards", "peak worker bytes"):
        assert word in result.out


def test_a_rerun_does_nothing(done, workers):
    before = snapshot(done.region.store)
    path = done.region.path.parent / "points.csv"
    result = run_here("calibrate", done.region.path, "--points", path, *workers)
    assert result.code == 0
    assert "0 shards done in 0.0 s, 24 done before" in result.out
    changed = {
        key for key, told in snapshot(done.region.store).items() if before[key][1] != told[1]
    }
    assert not changed


def test_bits_do_not_depend_on_the_cut(done, tmp_path, workers):
    other = make_map(tmp_path, shard=128)
    result = run_here("calibrate", other.region.path, "--points", other.points(), *workers)
    assert result.code == 0, result.err
    assert other.result()["correction"] == done.result()["correction"]
    np.testing.assert_array_equal(
        arrays(other.calibrated)["height"], arrays(done.calibrated)["height"]
    )


@pytest.mark.parametrize("grids", [(WEST, EAST), (DEGREES,)], ids=["two zones", "degrees"])
def test_other_grids(tmp_path, workers, grids):
    made = make_map(tmp_path, grids, lambda lon, truth: 6 + 0.15 * (truth - 300))
    result = run_here("calibrate", made.region.path, "--points", made.points(), *workers)
    assert result.code == 0, result.err
    tree = open_tree(Store.at(made.calibrated))
    for grid in grids:
        rows, columns = grid.shape
        values = np.hstack([
            np.vstack([tree.read(s.group, s.layer, s.year, s.region) for s in column])
            for column in _columns(tree.template, grid)
        ])  # fmt: skip
        assert values.shape == (rows, columns)
        assert rmse(values - made.truth[grid.name]) < 3


def _columns(template, grid):
    """The shards of a group in 2021, column by column."""
    shards = [s for s in template.shards("height") if (s.group, s.year) == (grid.name, 2021)]
    return [
        [s for s in shards if s.region.col == col] for col in sorted({s.region.col for s in shards})
    ]


# What is refused.


def test_a_map_without_bias_is_left_alone(tmp_path, workers):
    made = make_map(tmp_path, bias=lambda lon, truth: 0 * truth)
    before = snapshot(made.region.store)
    result = run_here("calibrate", made.region.path, "--points", made.points(), *workers)
    assert result.code == 2
    one_message(result.err, "points.csv: no correction is proven to help", "RMSE from", "±",
                "dropped, of 300 points")  # fmt: skip
    assert snapshot(made.region.store) == before


def test_too_few_points(tmp_path):
    made = make_map(tmp_path)
    result = run_here("calibrate", made.region.path, "--points", made.points(count=20), "--plan")
    assert result.code == 2
    one_message(result.err, "points are of use, and at least 30 are needed", "dropped, of 20")


def test_without_a_map(tmp_path):
    region = Regions(tmp_path, {"embeddings": {"href": "none.tif", "year": 2021}}).write("none")
    result = run_here("calibrate", region.path, "--points", "points.csv")
    assert result.code == 2
    one_message(result.err, "there is no map at", "run aeheight predict")


def test_a_map_that_is_not_whole(tmp_path):
    made = make_map(tmp_path)
    made.region.receipts("heights")[0].unlink()
    result = run_here("calibrate", made.region.path, "--points", made.points())
    assert result.code == 2
    one_message(result.err, "1 shards of the map are missing")


def test_other_points_are_refused_until_overwritten(tmp_path, workers):
    made = make_map(tmp_path)
    assert run_here("calibrate", made.region.path, "--points", made.points(), *workers).code == 0
    before = snapshot(made.region.store)
    other = made.points("other.csv", count=200, seed=1)
    result = run_here("calibrate", made.region.path, "--points", other, *workers)
    assert result.code == 2
    one_message(result.err, "points.digest", "points.rows: 300 -> 200", "calibrate --overwrite")
    assert snapshot(made.region.store) == before
    again = run_here("calibrate", made.region.path, "--points", other, "--overwrite", *workers)
    assert again.code == 0, again.err
    assert made.result()["points"]["rows"] == 200
    assert "24 shards done" in again.out


# What may go wrong.


def test_a_restart_goes_on_with_the_same_bytes(tmp_path, workers):
    made = make_map(tmp_path)
    call = ("calibrate", made.region.path, "--points", made.points(), *workers)
    assert run_here(*call).code == 0
    whole = {key: told[1] for key, told in snapshot(made.calibrated).items()}
    for receipt in made.region.receipts("calibrated")[:5]:
        receipt.unlink()
    (made.calibrated / "utm10n/height/c/0/1/1").unlink()
    (made.calibrated / "utm10n/height/c/0/0/0").unlink()
    result = run_here(*call)
    assert "5 shards done" in result.out
    assert {key: told[1] for key, told in snapshot(made.calibrated).items()} != whole
    damaged = run_here("verify", made.region.path, *workers)
    assert damaged.code == 1
    assert "calibrate 24 shards checked, 1 damaged" in damaged.out
    mended = run_here("verify", made.region.path, "--repair", *workers)
    assert mended.code == 0, mended.err
    assert {key: told[1] for key, told in snapshot(made.calibrated).items()} == whole


def test_a_flipped_byte_is_found_and_mended(tmp_path, workers):
    made = make_map(tmp_path)
    call = ("calibrate", made.region.path, "--points", made.points(), *workers)
    assert run_here(*call).code == 0
    victim = made.calibrated / "utm10n/novelty/c/1/0/1"
    sound = victim.read_bytes()
    flip(victim)
    assert run_here("verify", made.region.path, *workers).code == 1
    assert run_here("verify", made.region.path, "--repair", *workers).code == 0
    assert victim.read_bytes() == sound


def test_status_knows_the_corrected_map(done, tmp_path):
    assert "calibrate 24 of 24 shards, done" in run_here("status", done.region.path).out
    made = make_map(tmp_path)
    assert "calibrate" not in run_here("status", made.region.path).out


# The map between pixel centres.


def test_bilinear_values_of_a_plane_are_exact():
    rows, columns = np.indices((8, 9))
    plane = 3.0 + 2 * (rows + 0.5) - 5 * (columns + 0.5)
    rng = np.random.default_rng(0)
    row, column = rng.uniform(1, 7, 200), rng.uniform(1, 8, 200)
    np.testing.assert_allclose(bilinear(plane, row, column), 3 + 2 * row - 5 * column)


def test_a_missing_neighbour_does_not_count_but_a_missing_pixel_does():
    values = np.full((4, 4), 7.0)
    values[1, 2] = np.nan
    places = np.array([1.9, 1.4]), np.array([1.9, 2.5])
    np.testing.assert_allclose(bilinear(values, *places), [7.0, np.nan])


def test_the_map_at_its_own_pixel_centres(done):
    tree = open_tree(Store.at(done.region.heights))
    found = map_at(tree, 2021, *degrees(GRID)).reshape(GRID.shape)
    expected = arrays(done.region.heights)["height"][0]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.isnan(map_at(tree, 2021, np.array([0.0]), np.array([0.0]))).all()


def test_one_plane_in_metres_for_all_grids():
    assert plane_of((GRID,)) == GRID.crs
    for grids in ((WEST, EAST), (DEGREES,)):
        plane = plane_of(grids)
        x, y = Transformer.from_crs(4326, plane, always_xy=True).transform(*degrees(grids[0]))
        assert np.hypot(np.ptp(x), np.ptp(y)) == pytest.approx(
            np.hypot(*np.array(grids[0].pixel_metres()) * grids[0].shape), rel=0.03
        )
