"""Ground that is judged in one cube and taught by another, against a search pixel by pixel."""

from dataclasses import dataclass

import numpy as np
import pytest
from pyproj import Transformer

from aeheight.cube import Tree, create
from aeheight.grid import Grid
from aeheight.settings import CubeSettings, RegionSettings
from aeheight.splits import TEST, TRAIN, UNUSED, VALIDATION
from aeheight.steps import leaks as room
from aeheight.steps.leaks import leaks
from aeheight.steps.split import draw
from aeheight.store import Store
from aeheight.template import Layer, Template

USES = (UNUSED, TRAIN, VALIDATION, TEST)
BASE = Grid("EPSG:32610", 100.0, 700000.0, 4280000.0, (60, 80))
LAYERS = (Layer("height", "float32", np.nan), Layer("split", "uint8", UNUSED))


@dataclass(frozen=True)
class Cube:
    """A cube with heights of which some are missing, and any use of every pixel."""

    tree: Tree
    height: dict[str, np.ndarray]
    use: dict[str, np.ndarray]


def cube(place, *grids, seed=0, use=None):
    cut = CubeSettings(shard=32, chunk=16)
    tree = create(Store.at(place), Template(grids, LAYERS, (2021,), cut, "cube of a test"))
    rng = np.random.default_rng(seed)
    made = Cube(tree, {}, {})
    for grid in grids:
        height = rng.normal(100, 10, grid.shape).astype(np.float32)
        height[rng.random(grid.shape) < 0.2] = np.nan
        drawn = rng.choice(USES, grid.shape) if use is None else np.full(grid.shape, use)
        made.height[grid.name], made.use[grid.name] = height, drawn.astype(np.uint8)
    for layer, values in (("height", made.height), ("split", made.use)):
        for shard in tree.template.shards(layer):
            tree.write(shard, np.ascontiguousarray(values[shard.group][shard.region.slices]))
    return made


def settings(**split):
    return RegionSettings.model_validate(
        {
            "name": "x",
            "store": "x",
            "embeddings": {"source": "cog", "href": "x.tif", "year": 2021},
            "split": {"block": 10, "buffer": 1, "test": 0.4, "validation": 0.3, **split},
        }
    )


def searched(asked, own, other):
    """Leaks, one pixel after another."""
    found = set()
    for shard in own.tree.template.shards("split"):
        use = draw(asked, own.tree.template, shard)
        grid = own.tree.template.grid(shard.group)
        for row, col in np.argwhere(np.isin(use, (TEST, VALIDATION))):
            place = (shard.region.row + row, shard.region.col + col)
            if np.isnan(own.height[grid.name][place]):
                continue
            for there in other.tree.template.grids:
                move = Transformer.from_crs(grid.crs, there.crs, always_xy=True).transform
                x, y = move(grid.x()[place[1]], grid.y()[place[0]])
                distances = np.abs(there.y() - y), np.abs(there.x() - x)
                if any(d.min() > there.resolution / 2 for d in distances):
                    continue
                at = distances[0].argmin(), distances[1].argmin()
                if np.isnan(other.height[there.name][at]):
                    continue
                pair = use[row, col], other.use[there.name][at]
                if pair in ((TEST, TRAIN), (TEST, VALIDATION), (VALIDATION, TRAIN)):
                    found.add((grid.name, *place))
    return len(found)


EAST = Grid("EPSG:32611", 100.0, 178000.0, 4280000.0, (70, 60))
OTHERS = {
    "the same lattice": (Grid("EPSG:32610", 100.0, 703000.0, 4278000.0, (60, 80)),),
    "another lattice": (Grid("EPSG:32610", 100.0, 697030.0, 4281977.0, (50, 70)),),
    "another zone": (EAST,),
    "both zones": (BASE, EAST),
    "degrees": (Grid("EPSG:4326", 0.001, -120.7, 38.65, (70, 90)),),
}


@pytest.mark.parametrize("grids", OTHERS.values(), ids=OTHERS)
def test_every_pixel_that_leaks_counts_once(tmp_path, monkeypatch, grids):
    monkeypatch.setattr(room, "_SQUARE", 20)
    own, other = cube(tmp_path / "own", BASE), cube(tmp_path / "other", *grids, seed=1)
    found = leaks(settings(), own.tree, other.tree)
    assert found == searched(settings(), own, other) > 50


@pytest.mark.parametrize("place", [(760000, 4280000), (700000, 4290000), (-1e6, 1e6)])
def test_ground_elsewhere_leaks_nothing(tmp_path, place):
    far = Grid("EPSG:32610", 100.0, *place, (60, 80))
    other = cube(tmp_path / "other", far, use=TRAIN)
    assert leaks(settings(test=1.0), cube(tmp_path / "own", BASE).tree, other.tree) == 0


def test_across_the_180th_meridian(tmp_path):
    """One grid in degrees runs on past 180, the other begins at -180."""
    one = Grid("EPSG:4326", 0.01, 179.8, 10.0, (20, 60))
    other = Grid("EPSG:4326", 0.01, -180.0, 10.0, (20, 30))
    own, west = cube(tmp_path / "own", one), cube(tmp_path / "other", other, use=TRAIN)
    known = ~np.isnan(own.height["epsg4326"])[:, 20:50] & ~np.isnan(west.height["epsg4326"])
    assert leaks(settings(test=1.0), own.tree, west.tree) == known.sum()


@pytest.mark.parametrize("use", [UNUSED, TEST])
def test_what_nobody_trains_on_leaks_nothing(tmp_path, use):
    own, other = cube(tmp_path / "own", BASE), cube(tmp_path / "other", BASE, use=use)
    assert leaks(settings(), own.tree, other.tree) == 0


def test_ground_that_trains_in_both_leaks_nothing(tmp_path):
    own, other = cube(tmp_path / "own", BASE), cube(tmp_path / "other", BASE, use=TRAIN)
    assert leaks(settings(test=0.0, validation=0.0), own.tree, other.tree) == 0
