"""Zones: whose ground a pixel is, one group a zone with its halo, which shards are made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from aeheight.embeddings import NODATA
from aeheight.errors import InputError
from aeheight.grid import Grid, Zone, near_own, owned, utm_zone
from aeheight.sources import Reader, Sources, scan
from aeheight.template import Shard
from aeheight.windows import Region, tile, whole
from tests.tifs import random_codes, write_tif

RNG = np.random.default_rng(23)
EDGE = -120.0
"""Degrees: where zones 10 and 11 meet."""
LATITUDE = 45.0


def zone_grid(zone: int, lon: float, lat: float, rows: int, cols: int, step: float = 10.0) -> Grid:
    """A grid of a northern zone around a place in degrees."""
    crs = f"EPSG:326{zone:02d}"
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    left = round(x / step) * step - cols // 2 * step
    return Grid(crs, step, left, round(y / step) * step + rows // 2 * step, (rows, cols))


def longitudes(grid: Grid, region: Region) -> np.ndarray:
    """Of every pixel's centre, by pyproj."""
    part = grid.part(region)
    x, y = np.meshgrid(part.x(), part.y())
    return Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True).transform(x, y)[0]


# --- whose ground -------------------------------------------------------------------------------


@given(
    lon=st.floats(-0.3, 0.3),
    lat=st.floats(-70, 80),
    zone=st.integers(1, 60),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
@settings(max_examples=40, deadline=None)
def test_a_pixel_belongs_to_the_zone_that_its_centre_lies_in(
    lon: float, lat: float, zone: int, size: tuple[int, int]
) -> None:
    west = zone % 60 + 1
    edge = Zone(west, north=True).bounds[0]
    grids = [zone_grid(z, (edge + lon + 180) % 360 - 180, lat, *size, step=900.0)
             for z in (zone, west)]  # fmt: skip
    for grid, wanted in zip(grids, (False, True), strict=True):
        east = (longitudes(grid, whole(grid.shape)) - edge + 180) % 360 - 180 >= 0
        np.testing.assert_array_equal(owned(grids, grid, whole(grid.shape)), east == wanted)


@given(st.integers(-500, 500), st.integers(-500, 500), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=30, deadline=None)
def test_whose_ground_it_is_does_not_depend_on_the_cut(
    row: int, col: int, height: int, width: int
) -> None:
    grids = [zone_grid(zone, EDGE, LATITUDE, 400, 400, step=100.0) for zone in (10, 11)]
    every = owned(grids, grids[0], Region(-500, -500, 1100, 1100))
    part = Region(row, col, height, width)
    found = owned(grids, grids[0], part)
    np.testing.assert_array_equal(found, every[row + 500 : row + 500 + height,
                                               col + 500 : col + 500 + width])  # fmt: skip


def test_the_hemispheres_of_one_zone_meet_at_the_equator() -> None:
    grids = [Grid("EPSG:32633", 1000.0, 500_000.0, 5_000.0, (10, 4)),
             Grid("EPSG:32733", 1000.0, 500_000.0, 10_005_000.0, (10, 4))]  # fmt: skip
    north, south = (owned(grids, grid, whole(grid.shape)) for grid in grids)
    assert north[:5].all()
    assert not north[5:].any()
    np.testing.assert_array_equal(south, ~north)


def test_a_single_grid_owns_all_its_ground() -> None:
    grid = zone_grid(10, EDGE + 2, LATITUDE, 5, 6)
    assert owned([grid], grid, whole(grid.shape)).all()
    degrees = Grid("EPSG:4326", 0.1, 0.0, 50.0, (5, 5))
    assert owned([degrees], degrees, whole(degrees.shape)).all()
    assert utm_zone("EPSG:4326") is None


@pytest.mark.parametrize("halo", [0, 7, 40])
def test_squares_near_a_zone_are_those_that_hold_or_neighbour_its_pixels(halo: int) -> None:
    grids = [zone_grid(zone, EDGE, LATITUDE, 300, 300, step=100.0) for zone in (10, 11)]
    edge, grid = 32, grids[1]
    board = near_own(grids, grid, edge, halo)
    wide = owned(grids, grid, whole(grid.shape).expand(halo + edge))
    for square in tile((board.shape[0] * edge, board.shape[1] * edge), edge):
        rows, cols = square.expand(halo).within(whole(grid.shape).expand(halo + edge)).slices
        near = wide[rows, cols].any()
        assert board[square.row // edge, square.col // edge] == near


# --- one group a zone ---------------------------------------------------------------------------


def write_zone(folder: Path, zone: int, left_of_edge: int, right_of_edge: int) -> Path:
    """A tile of a zone that reaches so many pixels west and east of where the zones meet."""
    grid = zone_grid(zone, EDGE, LATITUDE, 96, 2)
    west = grid.left + 10 - left_of_edge * 10
    codes = random_codes(RNG, 96, left_of_edge + right_of_edge, 0.05)
    path = folder / "2021" / f"{zone}N" / "x-0000000000-0000000000.tiff"
    part = Grid(grid.crs, 10.0, west, grid.top, codes.shape[1:])
    return write_tif(path, codes, part.transform, grid.crs, NODATA)


def region(folder: Path, **more: Any) -> Any:
    """Settings of a region that leaves its grid to the tiles."""
    from aeheight.settings import RegionSettings  # noqa: PLC0415

    return RegionSettings.model_validate(
        {
            "name": "zones",
            "store": "runs/zones",
            "embeddings": {"source": "cog", "href": str(folder), "year": 2021},
            "cube": {"shard": 32, "chunk": 16, "halo": 20},
        }
        | more
    )


def read_all(sources: Sources, group: str) -> np.ndarray:
    """The codes of a whole group, shard by shard."""
    ground = next(each for each in sources.grounds if each.grid.name == group)
    reader = Reader(sources)
    out = np.full((64, *ground.grid.shape), NODATA, np.int8)
    for part in tile(ground.grid.shape, 32, ground.runs):
        out[(slice(None), *part.slices)] = reader.read(Shard(group, "embedding", 2021, part))
    return out


@pytest.fixture
def two_zones(tmp_path: Path) -> Path:
    """Tiles that end exactly where their zones do (give or take the meridian's slant)."""
    write_zone(tmp_path, 10, 100, 4)
    write_zone(tmp_path, 11, 4, 100)
    return tmp_path


def test_every_zone_becomes_a_group_that_reaches_a_halo_past_its_edge(two_zones: Path) -> None:
    sources = scan(region(two_zones))
    assert [ground.grid.name for ground in sources.grounds] == ["utm10n", "utm11n"]
    grids = [ground.grid for ground in sources.grounds]
    for grid, past in zip(grids, (1, -1), strict=True):
        lon = longitudes(grid, whole(grid.shape))
        assert lon.min() < EDGE < lon.max()
        own = owned(grids, grid, whole(grid.shape))
        # All pixels within the halo of own ground are held, and at most one more shard.
        beyond = (~own).sum(axis=1)
        assert beyond.min() >= 20
        assert beyond.max() <= 20 + 32 + 8
        assert (lon[~own] > EDGE).all() if past > 0 else (lon[~own] < EDGE).all()


def test_past_the_edge_stand_the_nearest_pixels_of_the_neighbour(two_zones: Path) -> None:
    sources = scan(region(two_zones))
    grids = [ground.grid for ground in sources.grounds]
    own_codes = [read_all(sources, grid.name) for grid in grids]
    for k, grid in enumerate(grids):
        mine, other = sources.grounds[k].embeddings.tiles
        assert mine.grid.crs == grid.crs != other.grid.crs
        import rasterio  # noqa: PLC0415

        tiles = {}
        for each in (mine, other):
            with rasterio.open(each.href) as dataset:
                tiles[each.href] = dataset.read()
        # The answer first: own tile where it has a code, else the neighbour's pixel at the centre.
        wanted = np.full_like(own_codes[k], NODATA)
        x, y = np.meshgrid(grid.x(), grid.y())
        for each in (other, mine):
            move = Transformer.from_crs(grid.crs, each.grid.crs, always_xy=True)
            there_x, there_y = move.transform(x, y)
            col = np.floor((there_x - each.grid.left) / 10).astype(int)
            row = np.floor((each.grid.top - there_y) / 10).astype(int)
            inside = (row >= 0) & (row < each.grid.shape[0])
            inside &= (col >= 0) & (col < each.grid.shape[1])
            codes = tiles[each.href][:, row[inside], col[inside]]
            take = codes[0] != NODATA
            rows, cols = np.nonzero(inside)
            wanted[:, rows[take], cols[take]] = codes[:, take]
        np.testing.assert_array_equal(own_codes[k], wanted)
        beyond = ~owned(grids, grid, whole(grid.shape))
        assert (wanted[0][beyond] != NODATA).mean() > 0.5


def test_a_zone_without_ground_of_its_own_in_the_area_is_left_out(tmp_path: Path) -> None:
    write_zone(tmp_path, 10, 100, 40)
    write_zone(tmp_path, 11, 40, 100)
    aoi = [EDGE - 0.013, LATITUDE - 0.003, EDGE - 0.009, LATITUDE + 0.003]
    (ground,) = scan(region(tmp_path, aoi=aoi)).grounds
    assert ground.grid.name == "utm10n"
    both = [EDGE - 0.004, LATITUDE - 0.003, EDGE + 0.004, LATITUDE + 0.003]
    assert len(scan(region(tmp_path, aoi=both)).grounds) == 2


def test_tiles_in_no_common_lattice_are_refused(two_zones: Path) -> None:
    write_tif(two_zones / "2021" / "12N" / "degrees.tiff", random_codes(RNG, 8, 8),
              Grid("EPSG:4326", 1e-4, -120, 45, (8, 8)).transform, "EPSG:4326", NODATA)  # fmt: skip
    with pytest.raises(InputError, match=r"several resolutions|not all UTM"):
        scan(region(two_zones))


# --- the area of interest -----------------------------------------------------------------------


def test_shards_outside_a_polygon_are_not_made(tmp_path: Path) -> None:
    grid = zone_grid(10, -123.0, LATITUDE, 128, 160)
    write_tif(tmp_path / "t.tiff", random_codes(RNG, 128, 160), grid.transform, grid.crs, NODATA)
    to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    corners = [(5, 5), (5, 150), (60, 5)]  # row, column: a triangle
    ring = [to_degrees.transform(grid.left + c * 10, grid.top - r * 10) for r, c in corners]
    shape = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    (tmp_path / "aoi.geojson").write_text(json.dumps(shape))
    bounds = {"crs": grid.crs, "resolution": 10, "bounds": list(grid.bounds)}
    settings = region(tmp_path / "t.tiff", grid=bounds, aoi=str(tmp_path / "aoi.geojson"))
    (ground,) = scan(settings).grounds
    made = {(r.row // 32, r.col // 32) for r in tile(grid.shape, 32, ground.runs)}
    # A shard is made where a pixel of it lies inside: below the line from (60, 5) to (5, 150).
    rows, cols = np.mgrid[0:128, 0:160] + 0.5
    inside = (rows > 5) & (cols > 5) & ((rows - 5) / 55 + (cols - 5) / 145 < 1)
    wanted = {(r // 32, c // 32) for r, c in np.argwhere(inside)}
    assert made == wanted
    assert len(made) < 4 * 5


def test_an_area_of_several_shards_begins_at_the_edges_of_the_tiles_blocks(tmp_path: Path) -> None:
    grid = zone_grid(10, -123.0, LATITUDE, 160, 160)
    write_tif(tmp_path / "t.tiff", random_codes(RNG, 160, 160), grid.transform, grid.crs, NODATA,
              tiled=True, blockxsize=16, blockysize=16)  # fmt: skip
    to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    west, south = to_degrees.transform(grid.left + 205, grid.top - 1205)
    east, north = to_degrees.transform(grid.left + 1105, grid.top - 405)
    (ground,) = scan(region(tmp_path / "t.tiff", aoi=[west, south, east, north])).grounds
    row, col = grid.offset(ground.grid.left, ground.grid.top)
    assert (row % 16, col % 16) == (0, 0)
    assert row <= 40
    assert col <= 20
    small = [west, south, *to_degrees.transform(grid.left + 405, grid.top - 1005)]
    (ground,) = scan(region(tmp_path / "t.tiff", aoi=small)).grounds
    assert max(ground.grid.shape) <= 24  # one shard: as it was asked for


def test_an_area_across_the_180th_meridian(tmp_path: Path) -> None:
    for zone, lon in ((60, 179.99), (1, -179.99)):
        grid = zone_grid(zone, lon, LATITUDE, 64, 300)
        path = tmp_path / "2021" / f"{zone}N" / "x.tiff"
        write_tif(path, random_codes(RNG, 64, 300), grid.transform, grid.crs, NODATA)
    aoi = [179.99, LATITUDE - 0.002, -179.99, LATITUDE + 0.002]
    sources = scan(region(tmp_path, aoi=aoi))
    assert [ground.grid.name for ground in sources.grounds] == ["utm01n", "utm60n"]
    for ground in sources.grounds:
        assert ground.grid.shape[1] < 300
