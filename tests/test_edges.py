"""Where two zones meet: known fields in both, brute force, and a map cut unlike its cube."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from aeheight.cube import Tree, create, open_tree, remove_tree
from aeheight.grid import Grid
from aeheight.metrics import Stats
from aeheight.receipts import Ledger, receipt_for
from aeheight.settings import CubeSettings
from aeheight.steps.edges import bilinear, compare, facing, opposite
from aeheight.store import Store
from aeheight.sums import merge
from aeheight.template import Layer, Template
from aeheight.windows import tile, whole
from tests.runs import Region as Run
from tests.runs import Regions, Result, copied

YEAR = 2021
WEST = Grid("EPSG:32631", 10.0, 731_500.0, 5_089_000.0, (150, 130))
EAST = Grid("EPSG:32632", 10.0, 266_600.0, 5_089_100.0, (160, 140))
PAIR = "zones/utm31n-utm32n"
LAYER = Layer("height", "float32", np.nan, timed=True)
COLUMNS = tuple[np.ndarray, np.ndarray]


def centres(grid: Grid) -> COLUMNS:
    """Easting and northing of every pixel."""
    return np.meshgrid(grid.x(), grid.y())


def degrees(grid: Grid) -> COLUMNS:
    move = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    return move.transform(*centres(grid))


def field(grid: Grid) -> np.ndarray:
    """A plane over the ground: 100 m a hundredth of a degree eastward, 50 m northward."""
    lon, lat = degrees(grid)
    return 1e4 * (lon - 6.0) + 5e3 * (lat - 45.9)


def tree_of(folder: Path, *values: np.ndarray, shard: int = 64) -> Tree:
    """A map of both zones, cut into shards."""
    cut = CubeSettings(shard=shard, chunk=32)
    tree = create(Store.at(folder), Template((WEST, EAST), (LAYER,), (YEAR,), cut, "map"))
    arrays = dict(zip(("utm31n", "utm32n"), values, strict=True))
    for made in tree.template.shards("height"):
        tree.write(made, arrays[made.group][made.region.slices].astype(np.float32))
    return tree


def parts(tree: Tree, group: str, edge: int) -> Iterator[tuple[str, Stats]]:
    for region in tile(tree.template.grid(group).shape, edge):
        here = tree.read(group, "height", YEAR, region)
        yield from compare(tree, group, YEAR, region, here)


def both(tree: Tree, edge: int = 64) -> Stats:
    """All sums of the pair, shard by shard."""
    found = [item for group in ("utm31n", "utm32n") for item in parts(tree, group, edge)]
    assert {name for name, _ in found} <= {PAIR}
    return merge(part for _, part in found)


def holed(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = values + rng.normal(0, 3, values.shape)
    out[rng.random(values.shape) < 0.02] = np.nan
    out[40:60, 30:50] = np.nan
    return out


def brute(west: np.ndarray, east: np.ndarray) -> np.ndarray:
    """Every difference, pixel by pixel, from the four pixels of the east about a western one."""
    move = Transformer.from_crs(WEST.crs, EAST.crs, always_xy=True)
    x, y = move.transform(*centres(WEST))
    found = []
    for row, col in np.argwhere(np.isfinite(west)):
        down = (EAST.top - y[row, col]) / 10 - 0.5
        right = (x[row, col] - EAST.left) / 10 - 0.5
        i, j = math.floor(down), math.floor(right)
        if not (0 <= i < EAST.shape[0] - 1 and 0 <= j < EAST.shape[1] - 1):
            continue
        a, b = down - i, right - j
        weights = np.array([[(1 - a) * (1 - b), (1 - a) * b], [a * (1 - b), a * b]])
        found.append(west[row, col] - (weights * east[i : i + 2, j : j + 2]).sum())
    differences = np.array(found)
    return differences[np.isfinite(differences)]


def test_one_plane_in_both_zones_differs_by_nothing(tmp_path: Path) -> None:
    """Bound: float32 of heights below 256 m, 1.5e-5, and the bend of a parallel within 10 m."""
    summary = both(tree_of(tmp_path, field(WEST), field(EAST))).summary()
    assert summary["n"] > 5_000
    assert abs(summary["mean"]) < 1e-5
    assert max(-summary["min"], summary["max"]) < 1e-4


@pytest.mark.parametrize("offset", [-3.5, 40.0])
def test_an_offset_is_the_mean(tmp_path: Path, offset: float) -> None:
    """The first by name less the second."""
    sums = both(tree_of(tmp_path, field(WEST) + offset, field(EAST)))
    assert sums.mean_difference == pytest.approx(offset, abs=1e-5)
    assert sums.summary()["rmse"] == pytest.approx(abs(offset), abs=1e-4)


@pytest.mark.parametrize("shard", [32, 64, 256])
def test_every_pixel_that_both_predicted_counts_once(tmp_path: Path, shard: int) -> None:
    """By brute force, for any cut of the map and of the tasks."""
    west, east = holed(field(WEST), 1), holed(field(EAST), 2)
    tree = tree_of(tmp_path, west, east, shard=shard)
    expected = brute(west.astype(np.float32), east.astype(np.float32))
    for edge in (50, 64, 1000):
        summary = both(tree, edge).summary()
        assert summary["n"] == expected.size
        assert summary["mean"] == pytest.approx(expected.mean(), abs=1e-6)
        assert summary["rmse"] == pytest.approx(np.sqrt((expected**2).mean()), abs=1e-6)
        assert summary["le90"] == pytest.approx(np.quantile(np.abs(expected), 0.9), abs=0.005)
        assert summary["max"] == pytest.approx(expected.max(), abs=1e-5)


def test_large_shards_are_compared_in_squares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(tmp_path, holed(field(WEST), 1), holed(field(EAST), 2), shard=256)
    expected = both(tree, 1000)
    monkeypatch.setattr("aeheight.steps.edges._SQUARE", 37)
    found = both(tree, 1000)
    assert found.n == expected.n
    assert found.histogram == expected.histogram


def test_what_one_zone_lacks_is_not_compared(tmp_path: Path) -> None:
    nothing = np.full(EAST.shape, np.nan)
    assert list(parts(tree_of(tmp_path, field(WEST), nothing), "utm31n", 64)) == []


def test_what_is_read_holds_all_that_is_compared() -> None:
    """The inputs of a shard are the other zone's shards under `opposite`."""
    move = Transformer.from_crs(WEST.crs, EAST.crs, always_xy=True)
    for region in tile(WEST.shape, 40):
        x, y = move.transform(*(axis[region.slices] for axis in centres(WEST)))
        row, col = (EAST.top - y) / 10 - 0.5, (x - EAST.left) / 10 - 0.5
        inside = (row >= 0) & (col >= 0) & (row < EAST.shape[0] - 1) & (col < EAST.shape[1] - 1)
        found = opposite(WEST, region, EAST)
        if not inside.any():
            continue
        assert found is not None
        assert found.row <= np.floor(row[inside]).min()
        assert found.col <= np.floor(col[inside]).min()
        assert found.bottom >= np.floor(row[inside]).max() + 2
        assert found.right >= np.floor(col[inside]).max() + 2
        assert found.height < region.height + 12  # and little more


def test_only_adjoining_zones_face_each_other_and_once() -> None:
    crs = ["EPSG:32601", "EPSG:32631", "EPSG:32632", "EPSG:32633", "EPSG:32660", "EPSG:32731"]
    grids = [Grid(code, 10.0, 500_000.0, 100_000.0, (10, 10)) for code in crs]
    named = {grid.name: {other.name for other in facing(grids, grid)} for grid in grids}
    assert named == {
        "utm01n": {"utm60n"},
        "utm31n": {"utm31s", "utm32n"},
        "utm31s": {"utm32n"},
        "utm32n": {"utm33n"},
        "utm33n": set(),
        "utm60n": set(),
    }
    plain = Grid("EPSG:4326", 0.1, 0.0, 1.0, (10, 10))
    assert facing([plain, replace(plain, crs="EPSG:2154")], plain) == []


def test_the_two_sides_of_the_equator_share_their_lattice(tmp_path: Path) -> None:
    """UTM south is UTM north, 10,000 km farther up: values meet exactly."""
    north = Grid("EPSG:32631", 10.0, 500_000.0, 200.0, (40, 30))
    south = Grid("EPSG:32731", 10.0, 500_000.0, 10_000_200.0, (40, 30))
    rng = np.random.default_rng(0)
    values = rng.normal(0, 100, (40, 30)).astype(np.float32)
    cut = CubeSettings(shard=64, chunk=32)
    tree = create(Store.at(tmp_path), Template((north, south), (LAYER,), (YEAR,), cut, "map"))
    for shard in tree.template.shards("height"):
        tree.write(shard, values)
    ((name, sums),) = compare(tree, "utm31n", YEAR, whole(north.shape), values)
    assert name == "zones/utm31n-utm31s"
    assert sums.n == 39 * 29  # the last row and column have no next pixel
    assert sums.maximum < 1e-3


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.tuples(st.floats(-2, 8), st.floats(-2, 8)), min_size=1, max_size=30),
    st.tuples(*[st.floats(-10, 10)] * 3),
)
def test_a_plane_is_interpolated_exactly(
    height: int, width: int, places: list[tuple[float, float]], plane: tuple[float, ...]
) -> None:
    row, col = np.array(places).T
    down, right = np.mgrid[:height, :width]
    values = (plane[0] + plane[1] * down + plane[2] * right).astype(np.float32)
    found = bilinear(values, row, col)
    outside = (row < 0) | (col < 0) | (row >= height - 1) | (col >= width - 1)
    np.testing.assert_array_equal(np.isnan(found), outside)
    expected = (plane[0] + plane[1] * row + plane[2] * col)[~outside]
    np.testing.assert_allclose(found[~outside], expected, atol=2e-5)


def recut(run: Run, shard: int, novelty: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
    """The same map in shards of another size, with the receipts of a predict that made it so."""
    store, ledger = Store.at(run.heights), Ledger(Store.at(run.store / "heights.receipts"))
    old = open_tree(store)
    (grid,) = old.template.grids
    names = [layer.name for layer in old.template.layers]
    values = {name: old.read(grid.name, name, YEAR, whole(grid.shape)) for name in names}
    layers = [layer for layer in old.template.layers if not novelty or layer.name != "novelty"]
    if novelty:
        layers.append(Layer("novelty", "float32", np.nan, timed=True))
        values["novelty"] = novelty(values["height"])
    made, checkpoint = ledger.settings(), ledger.store.read("model.ckpt")
    assert made is not None
    remove_tree(store)
    ledger.discard()
    cut = replace(old.template, layers=tuple(layers), cut=CubeSettings(shard=shard, chunk=32))
    tree = create(store, cut)
    ledger = ledger.begin(made | {"heights": tree.identity})
    ledger.store.write("model.ckpt", checkpoint)
    for each in cut.shards("height"):
        for layer in layers:
            tree.write(replace(each, layer=layer.name), values[layer.name][each.region.slices])
        part = values["height"][each.region.slices]
        ledger.leave(receipt_for(each, part, "x", ~np.isnan(part), ledger.key, 0.0))


def numbers(run: Run) -> dict[str, object]:
    """All that the map's cut into shards says nothing of."""
    metrics = run.metrics()
    metrics["seams"].pop("shards")
    return {name: part for name, part in metrics.items() if name != "provenance"}


@pytest.fixture
def again(small_run: Run, regions: Regions, aeheight: Callable[..., Result]) -> Callable[..., Run]:
    """The small run with its map cut anew, and evaluated."""

    def evaluated(shard: int, novelty: Callable[[np.ndarray], np.ndarray] | None = None) -> Run:
        run = copied(small_run, regions, f"cut{shard}")
        recut(run, shard, novelty)
        result = aeheight("evaluate", run.path, "--overwrite")
        assert result.code == 0, result.err
        return run

    return evaluated


def test_a_map_may_be_cut_unlike_its_cube(
    small_run: Run, again: Callable[..., Run], aeheight: Callable[..., Result]
) -> None:
    shard = 192  # of the cube: 64; the last ones are clipped
    run = again(shard)
    assert numbers(run) == numbers(small_run)
    assert run.metrics()["zones"] == []
    shown = aeheight("evaluate", run.path, "--plan", "--json")
    assert json.loads(shown.out)["pending"] == 0
    # One shard of the map is made again from something else: the cube's shards on it are summed.
    ledger = Ledger(Store.at(run.store / "heights.receipts"))
    tree = open_tree(Store.at(run.heights))
    first = replace(tree.template.shards("height")[0], inputs="0123456789abcdef")
    values = tree.read(first.group, "height", YEAR, first.region)
    ledger.forget({first.name})
    key = ledger.current().key
    ledger.leave(receipt_for(first, values, "x", ~np.isnan(values), key, 0.0))
    shown = aeheight("evaluate", run.path, "--plan", "--json")
    seen = math.ceil(shard / 64) + 1  # of those beside it two pixels are seen
    assert json.loads(shown.out)["pending"] == seen**2


def test_novelty_is_a_criterion_and_a_map(again: Callable[..., Run]) -> None:
    def novelty(heights: np.ndarray) -> np.ndarray:
        """0.25, 0.75, 1.5 and 3 by quarters of the columns."""
        quarter = np.arange(heights.shape[1]) * 4 // heights.shape[1]
        values = np.array([0.25, 0.75, 1.5, 3.0], np.float32)[quarter]
        return np.where(np.isnan(heights), np.float32(np.nan), values)

    run = again(128, novelty)
    rows = [row for row in run.metrics()["by"]["novelty"] if row["split"] == "all"]
    assert [(row["lo"], row["hi"]) for row in rows] == [(0, 0.5), (0.5, 1), (1, 2), (2, None)]
    tree, cube = open_tree(Store.at(run.heights)), open_tree(Store.at(run.cube))
    (grid,) = tree.template.grids
    predicted = tree.read(grid.name, "height", YEAR, whole(grid.shape))
    difference = predicted - cube.read(grid.name, "height", None, whole(grid.shape))
    for row, part in zip(rows, np.split(difference, 4, axis=1), strict=True):
        known = part[np.isfinite(part)].astype(np.float64)
        assert row["n"] == known.size
        assert row["rmse"] == pytest.approx(np.sqrt((known**2).mean()))
    assert sum(row["n"] for row in rows) == run.metrics()["model"]["all"]["n"]
    page = (run.store / "report" / "index.html").read_text()
    assert "Novelty." in page
    assert "2 or more" in page
    assert "of test ground has a novelty above 1" in page
