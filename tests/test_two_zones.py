"""A region across two zones, from tiles to report: all ground counts once, and nothing leaks."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from pyproj import Transformer
from rasterio.warp import Resampling, reproject

from aeheight.crossings import MARGIN
from aeheight.cube import open_tree
from aeheight.receipts import Ledger
from aeheight.settings import SplitSettings
from aeheight.splits import TEST, TRAIN, VALIDATION, draw_split
from aeheight.store import Store
from aeheight.template import Shard
from aeheight.windows import Region, whole
from pipelines.world import make_world
from tests.runs import Region as Run
from tests.runs import Regions, Result, copied, run_here, small_settings, whole_shards

MERIDIAN = 6.0
BUFFER = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run on the small world of two zones."""
    folder = tmp_path_factory.mktemp("zones")
    world = make_world(folder / "world", size=256, zones=2)
    regions = Regions(folder, small_settings(world))
    region = regions.write(
        "zones",
        grid=None,
        cube={"shard": 64, "chunk": 32, "halo": 20},
        split={"block": 16, "buffer": BUFFER, "test": 0.3, "validation": 0.2},
        model={"architecture": "ridge", "base": "none"},
        predict={"window": 64, "halo": 16, "batch": 4},
    )
    result = run_here("run", region.path, "--workers", "2")
    assert result.code == 0, result.err
    return region


def groups(path: Path) -> dict[str, xr.Dataset]:
    with xr.open_datatree(path, engine="zarr") as tree:
        return {name: group.to_dataset().load() for name, group in tree.children.items()}


def longitude(group: xr.Dataset) -> np.ndarray:
    crs = group.spatial_ref.attrs["crs_wkt"]
    x, y = np.meshgrid(group.x, group.y)
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)[0]


def test_there_is_one_group_a_zone_in_cube_and_map(finished: Run) -> None:
    for path in (finished.cube, finished.heights):
        found = groups(path)
        assert list(found) == ["utm31n", "utm32n"]
        for group in found.values():
            east = longitude(group) >= MERIDIAN
            assert east.any()
            assert not east.all()
    assert whole_shards(finished, "cube")
    assert whole_shards(finished)


def test_all_ground_is_judged_once(finished: Run) -> None:
    """The figures of metrics.json, from arrays that xarray reads."""
    references, predictions = [], []
    cube, heights = groups(finished.cube), groups(finished.heights)
    for name, group in cube.items():
        own = (longitude(group) >= MERIDIAN) == (name == "utm32n")
        known = own & np.isfinite(group.height.to_numpy())
        references.append(group.height.to_numpy()[known].astype(np.float64))
        predictions.append(heights[name].height.isel(time=0).to_numpy()[known].astype(np.float64))
    reference, predicted = np.concatenate(references), np.concatenate(predictions)
    found = finished.metrics()["model"]["all"]
    valid = np.isfinite(predicted)
    assert found["n"] == valid.sum()
    assert found["coverage"] == pytest.approx(valid.mean(), rel=1e-12)
    difference = (predicted - reference)[valid]
    assert found["rmse"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-9)
    # The square of 256 px lies in both zones: what is counted is about its area.
    assert 0.97 < reference.size / 256**2 < 1.01
    assert found["n"] == sum(
        finished.metrics()["model"][split]["n"] for split in ("train", "validation", "test")
    ) + unused(cube, heights)


def unused(cube: dict[str, xr.Dataset], heights: dict[str, xr.Dataset]) -> int:
    """Own pixels in the buffers, with a reference and a prediction."""
    count = 0
    for name, group in cube.items():
        own = (longitude(group) >= MERIDIAN) == (name == "utm32n")
        known = np.isfinite(group.height) & np.isfinite(heights[name].height.isel(time=0))
        count += int((own & known.to_numpy() & (group.split.to_numpy() == 0)).sum())
    return count


def test_the_difference_where_they_meet_is_reported(finished: Run) -> None:
    """Parity with GDAL's bilinear warp of the eastern map onto the western pixels."""
    (row,) = finished.metrics()["zones"]
    assert row["between"] == ["utm31n", "utm32n"]
    assert all(math.isfinite(value) for name, value in row.items() if name != "between")
    grids = open_tree(Store.at(finished.heights)).template.grids
    maps = groups(finished.heights)
    west, east = (maps[grid.name].height.isel(time=0).to_numpy() for grid in grids)
    known = np.pad(np.isfinite(east), 2)  # a rim that is missing: GDAL's edges weigh otherwise
    outer = grids[1].part(whole(grids[1].shape).expand(2))

    def warped(values: np.ndarray) -> np.ndarray:
        out = np.zeros(west.shape)
        reproject(
            values.astype(np.float64),
            out,
            src_transform=outer.transform,
            src_crs=outer.crs,
            dst_transform=grids[0].transform,
            dst_crs=grids[0].crs,
            resampling=Resampling.bilinear,
            XSCALE=1,
            YSCALE=1,
        )
        return out

    there = warped(np.nan_to_num(np.pad(east, 2)))
    both = np.isfinite(west) & (warped(known) > 1 - 1e-7)
    d = (west - there)[both]
    assert row["n"] == d.size > 1000
    # GDAL approximates the places by some thousandths of a pixel.
    assert row["mean"] == pytest.approx(d.mean(), abs=1e-3)
    assert row["rmse"] == pytest.approx(np.sqrt((d**2).mean()), rel=1e-3)
    page = (finished.store / "report" / "index.html").read_text()
    assert "Where two zones meet" in page
    assert "utm31n and utm32n" in page
    assert "windows of 64 px, of which a halo of 16 px" in page
    assert "Estimate and truth" in page


def test_a_neighbour_that_is_made_again_is_compared_again(
    finished: Run, tmp_path: Path, aeheight: Callable[..., Result]
) -> None:
    """Sums are made again where a shard of the other zone was made from something else."""
    twin = copied(finished, Regions(tmp_path, finished.settings))
    ledger = Ledger(Store.at(twin.store / "heights.receipts")).current()
    template = open_tree(Store.at(twin.heights)).template
    west, east = template.grids
    move = Transformer.from_crs(east.crs, west.crs, always_xy=True)
    receipts = list(ledger.receipts(ledger.done()))
    other = next(r for r in receipts if r.shard.startswith("utm32n") and r.valid > 1000)
    ledger.forget({other.shard})
    ledger.leave(replace(other, inputs="0123456789abcdef"))
    report = Ledger(Store.at(twin.store / "report.receipts"))
    before, numbers = report.done(), twin.metrics()
    assert aeheight("evaluate", twin.path).code == 0
    after = report.done()
    assert twin.metrics()["zones"] == numbers["zones"]
    assert twin.metrics()["model"] == numbers["model"]
    again = {Shard.parse(name) for name in before if before[name] != after[name]}
    region = Shard.parse(other.shard).region
    seen = [s for s in template.shards("height") if s.region.intersect(region.expand(MARGIN))]
    beside = {s.region for s in seen if s.group == "utm32n"}  # for the steps across its edges
    assert {s.region for s in again if s.group == "utm32n"} == beside
    x, y = move.transform(*np.meshgrid(east.part(region).x(), east.part(region).y()))
    row, col = (west.top - y) // 640 * 64, (x - west.left) // 640 * 64
    squares = {s.region for s in template.shards("height") if s.group == "utm31n"}
    under = {s for s in squares if ((row == s.row) & (col == s.col)).any()}
    found = {s.region for s in again if s.group == "utm31n"}
    assert under <= found < squares
    assert all(min(math.dist((s.row, s.col), (u.row, u.col)) for u in under) < 91 for s in found)


def test_training_ground_keeps_away_from_what_another_zone_may_test(finished: Run) -> None:
    cube = groups(finished.cube)
    for name, group in cube.items():
        use, lon = group.split.to_numpy(), longitude(group)
        own = (lon >= MERIDIAN) == (name == "utm32n")
        assert (use[~own] == 0).all()
        metres = np.abs(lon - MERIDIAN) * 111_320 * np.cos(np.radians(45.9))
        # The buffer is a square of pixels on a lattice that the meridian crosses aslant.
        assert metres[(use == TRAIN) | (use == VALIDATION)].min() > 0.9 * BUFFER * 10
        assert (use == TEST).any()
        assert (use == TRAIN).any()


def test_foreign_ground_is_unused_and_kept_away_from() -> None:
    settings = SplitSettings(block=8, buffer=3, test=0.3, validation=0.2, seed=1)
    shape = (64, 64)
    usual = draw_split(settings, shape, whole(shape), 0.3, 0.2)
    seen = whole(shape).expand(3)
    foreign = np.zeros(seen.shape, bool)
    foreign[:, 3 + 40 :] = True
    found = draw_split(settings, shape, whole(shape), 0.3, 0.2, foreign)
    assert (found[:, 40:] == 0).all()
    assert not np.isin(found[:, 37:40], (TRAIN, VALIDATION)).any()
    np.testing.assert_array_equal(found[:, :37][usual[:, :37] == TEST], TEST)
    far = found[:, :34]
    np.testing.assert_array_equal(far, usual[:, :34])
    part = Region(10, 30, 20, 20)
    rows, cols = part.expand(3).within(seen).slices
    cut = draw_split(settings, shape, part, 0.3, 0.2, foreign[rows, cols])
    np.testing.assert_array_equal(cut, found[part.slices])


def test_bounds_in_one_crs_say_nothing_in_two(
    finished: Run, tmp_path: Path, aeheight: Callable[..., Result]
) -> None:
    regions = Regions(tmp_path, finished.settings)
    west, south, east, north = 0.0, 0.0, 1.0, 1.0
    region = regions.write(
        "bounds", store=str(finished.store), split={"test": [west, south, east, north]}
    )
    result = aeheight("train", region.path, "--overwrite")
    assert result.code == 2
    assert "GeoJSON" in result.err
