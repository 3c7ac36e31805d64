"""From lattice to lattice: exact means and interpolations, from one raster or cut into many."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer
from rasterio.warp import Resampling, reproject

from aeheight.grid import Grid
from aeheight.sources import resample as room
from aeheight.sources.heights import HeightSource, place, read_heights
from aeheight.sources.resample import Lattice, average, bilinear, resample
from aeheight.windows import Region, whole
from tests.tifs import CRS, LEFT, RNG, TOP, block_mean, grid_of, read, source_of, write_heights


def overlaps(edges: np.ndarray, size: int) -> np.ndarray:
    """(boxes, pixels): how much of every pixel lies in every box, one by one."""
    weights = np.zeros((len(edges) - 1, size))
    for box in range(len(edges) - 1):
        for pixel in range(size):
            inside = min(edges[box + 1], pixel + 1) - max(edges[box], pixel)
            weights[box, pixel] = max(inside, 0)
    return weights


def rough(rows: int, cols: int, holes: float = 0.0) -> np.ndarray:
    values = RNG.uniform(50, 400, (rows, cols)).astype(np.float32)
    values[RNG.random((rows, cols)) < holes] = np.nan
    return values


@pytest.mark.parametrize("ratio", [1.01, 2.0, 2.5, 10 / 3, 5.0, 9.9])
@pytest.mark.parametrize("start", [1.0, 1.37, 1.999])
@pytest.mark.parametrize("holes", [0.0, 0.4])
def test_means_weigh_by_area(ratio: float, start: float, holes: float) -> None:
    edges = start + ratio * np.arange(21)
    size = int(edges[-1]) + 3
    values = rough(size, size, holes)
    weights, valid = overlaps(edges, size), np.isfinite(values)
    total = weights @ np.where(valid, values, 0).astype(np.float64) @ weights.T
    share = weights @ valid.astype(np.float64) @ weights.T
    wanted = total / np.where(share > 0, share, np.nan)
    found = average(values, edges[:, None], edges[None, :])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    transform = Affine(ratio, 0, LEFT + start, 0, -ratio, TOP - start)
    by_gdal = np.full((20, 20), np.nan, np.float32)
    reproject(
        values, by_gdal, src_transform=Affine(1, 0, LEFT, 0, -1, TOP), src_crs=CRS,
        dst_transform=transform, dst_crs=CRS, src_nodata=np.nan, dst_nodata=np.nan,
        resampling=Resampling.average, tolerance=1e-6,
    )  # fmt: skip
    np.testing.assert_allclose(found, by_gdal, rtol=1e-6)


def test_means_do_not_round_by_what_lies_far_away() -> None:
    values, edges = rough(60, 60), 1.3 + 2.7 * np.arange(20)
    near = values.copy()
    near[:, 30:] = np.nan
    near[30:] = np.nan
    found, alone = (average(v, edges, edges) for v in (values, near))
    np.testing.assert_array_equal(found[:10, :10], alone[:10, :10])


@pytest.mark.parametrize("ratio", [0.33, 0.1, 1.7])
def test_between_four_pixels(ratio: float) -> None:
    values = rough(30, 30)
    at = 2 + ratio * (np.arange(15) + 0.5)
    found = bilinear(values, at[:, None], at[None, :])
    low = np.floor(at - 0.5).astype(int)
    part = at - 0.5 - low
    along = np.zeros((15, 30))
    along[np.arange(15), low], along[np.arange(15), low + 1] = 1 - part, part
    np.testing.assert_allclose(found, along @ values.astype(np.float64) @ along.T, rtol=1e-6)


def test_a_void_keeps_its_shape_and_takes_no_part() -> None:
    values = np.full((9, 9), 100, np.float32)
    values[4, 4] = np.nan
    at = 2 + 0.1 * (np.arange(50) + 0.5)
    found = bilinear(values, at[:, None], at[None, :])
    void = (np.floor(at) == 4)[:, None] & (np.floor(at) == 4)[None, :]
    np.testing.assert_array_equal(np.isnan(found), void)
    assert set(found[~void]) == {100.0}


# --- other CRS ----------------------------------------------------------------------------------

EAST = "+proj=laea +lat_0=70 +lon_0=20 +datum=WGS84"


@pytest.mark.parametrize("turned", [0, 3, 30, 45, 90])
@pytest.mark.parametrize("step", [2.0, 5.0, 8.0])
def test_turned_means_come_near_the_true_ones(turned: int, step: float) -> None:
    """Against every pixel of the grid cut into 40 x 40; GDAL is 1.3 and 1.1 m off at 45 degrees."""
    north = f"+proj=stere +lat_0=90 +lat_ts=70 +lon_0={20 - turned} +datum=WGS84"
    grid, edge, size = Grid(EAST, 10.0, 0.0, 0.0, (32, 32)), 40, int(600 / step)
    to_north = Transformer.from_crs(EAST, north, always_xy=True)
    x0, y0 = to_north.transform(160, -160)
    source = Lattice(north, step, step, round(x0) - 300.0, round(y0) + 300.0)
    rows, cols = np.mgrid[:size, :size] * step
    fine = (np.arange(32 * edge) + 0.5) * 10 / edge
    x, y = to_north.transform(*np.meshgrid(fine, -fine))
    at = ((source.top - y) / step).astype(int), ((x - source.left) / step).astype(int)
    rng = np.random.default_rng([turned, int(step)])  # whatever ran before in this process
    slope, noise = 300 + 0.3 * cols + 0.2 * rows, rng.normal(0, 3, rows.shape)
    for ground, largest, rms in ((slope, 0.1, 0.04), (noise, 0.3, 0.06)):
        values = ground.astype(np.float32)

        def window(part: Region, values: np.ndarray = values) -> np.ndarray:
            found = np.full(part.shape, np.nan, np.float32)
            if shared := part.intersect(whole(values.shape)):
                found[shared.within(part).slices] = values[shared.slices]
            return found

        found = resample(source, grid, whole(grid.shape), np.ones(grid.shape, bool), window)
        off = found - block_mean(values[at], edge)
        assert np.abs(off).max() < largest
        assert np.sqrt(np.mean(off**2)) < rms


@pytest.mark.parametrize("step", [0.07, 1.0, 4.0, 30.0])
def test_what_is_held_at_once_is_bounded(step: float) -> None:
    grid, sizes = grid_of(300, 300), []

    def window(part: Region) -> np.ndarray:
        sizes.append(part.size)
        return np.full(part.shape, 5, np.float32)

    part = Region(250, 200, 20, 20)
    source = Lattice(CRS, step, step, LEFT, TOP)
    found = resample(source, grid, part, np.ones(part.shape, bool), window)
    np.testing.assert_array_equal(found, 5)
    assert max(sizes) <= room._WINDOW


# --- rasters that are one surface ---------------------------------------------------------------

WIDE = grid_of(280, 290)


def cut(folder: Path, heights: np.ndarray, left: float, top: float, step: float) -> list[Path]:
    """The same raster as many files, whose edges lie anywhere."""
    rows = [0, 11, 12, heights.shape[0] // 2 + 3]
    cols = [0, 7, heights.shape[1] // 2 + 1]
    paths = []
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            below, right = [*rows, None][i + 1], [*cols, None][j + 1]
            part, at = heights[row:below, col:right], (left + col * step, top - row * step)
            paths.append(write_heights(folder / f"{i}{j}.tif", part, *at, step))
    return paths


@pytest.mark.parametrize("step", [2.0, 3.0, 4.0, 10.0, 30.0])
def test_a_raster_in_pieces_is_the_raster(tmp_path: Path, step: float) -> None:
    edge = int(3200 / step)
    heights, corner = rough(edge, edge, 0.05), (LEFT - 47, TOP + 33)
    one = write_heights(tmp_path / "one.tif", heights, *corner, step)
    pieces = cut(tmp_path / "pieces", heights, *corner, step)
    np.testing.assert_array_equal(read(pieces, WIDE), read(one, WIDE))


def test_pieces_in_degrees(tmp_path: Path) -> None:
    heights, step = rough(120, 130), 1 / 3600
    west, north = -124.12, 38.668
    one = write_heights(tmp_path / "one.tif", heights, west, north, step, crs="EPSG:4326")
    paths = []
    for i in range(3):
        for j in range(2):
            part = heights[i * 40 : i * 40 + 40, j * 65 : j * 65 + 65]
            at = west + j * 65 * step, north - i * 40 * step
            paths.append(write_heights(tmp_path / f"{i}{j}.tif", part, *at, step, crs="EPSG:4326"))
    wanted = read(one, WIDE)
    assert np.isfinite(wanted).any()
    np.testing.assert_array_equal(read(paths, WIDE), wanted)


def test_across_the_180th_meridian(tmp_path: Path) -> None:
    """Two tiles of either side meet without a seam."""
    step, grid = 0.0005, Grid("EPSG:32701", 10.0, 179_900.0, 8_230_000.0, (200, 200))
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32701", always_xy=True).transform(180, -16.0)
    grid = replace(grid, left=round(x) - 1000.0, top=round(y) - 1000.0)
    heights = rough(100, 100)
    west = write_heights(
        tmp_path / "w.tif", heights[:, :50], 180 - 50 * step, -16.0, step, None, "EPSG:4326"
    )
    east = write_heights(
        tmp_path / "e.tif", heights[:, 50:], -180.0, -16.0, step, None, "EPSG:4326"
    )
    whole_world = write_heights(
        tmp_path / "beyond.tif", heights, 180 - 50 * step, -16.0, step, None, "EPSG:4326"
    )
    found, wanted = read([west, east], grid), read(whole_world, grid)
    assert np.isfinite(wanted[:, 20:-20]).all()
    np.testing.assert_array_equal(found, wanted)


def test_half_covered_pixels_at_the_rim_have_a_mean(tmp_path: Path) -> None:
    path = write_heights(
        tmp_path / "d.tif", np.full((20, 20), 7, np.float32), LEFT + 16, TOP - 16, 2.0
    )
    found = read(path, grid_of(8, 8))
    wanted = np.full((8, 8), np.nan)
    wanted[1:6, 1:6] = 7
    np.testing.assert_array_equal(found, wanted)


def test_precedence_between_lattices_is_that_of_the_first_raster(tmp_path: Path) -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0}
    steps = {"a": 10.0, "b": 5.0, "c": 10.0}
    for name, value in values.items():
        edge = int(80 / steps[name])
        heights = np.full((edge, edge), value, np.float32)
        heights[: edge // 2, : {"a": edge // 2, "b": edge, "c": 0}[name]] = np.nan
        write_heights(tmp_path / f"{name}.tif", heights, step=steps[name])
    found = read(tmp_path, grid_of(8, 8))
    assert set(found[4:].ravel()) == {1.0}
    np.testing.assert_array_equal(found[:4], [[3, 3, 3, 3, 1, 1, 1, 1]] * 4)


# --- where a raster lies ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeightSource, np.ndarray]:
    """Pieces of four lattices, two of them in other CRS, and their heights at once."""
    folder = tmp_path_factory.mktemp("many")
    cut(folder / "a", rough(240, 260, 0.3), LEFT + 300, TOP - 300, 4.0)
    cut(folder / "b", rough(60, 50, 0.3), LEFT - 51, TOP + 77, 30.0)
    x, y = Transformer.from_crs(CRS, "EPSG:32611", always_xy=True).transform(LEFT, TOP)
    for n in range(3):
        at = x + 400 * n, y - 700 * n
        write_heights(folder / "c" / f"{n}.tif", rough(150, 150), *at, 6.0, crs="EPSG:32611")
    for n in range(3):
        at = -124.115 + 0.01 * n, 38.66 - 0.01 * n
        write_heights(folder / "d" / f"{n}.tif", rough(40, 40), *at, 1 / 3600, crs="EPSG:4326")
    paths = sorted(folder.rglob("*.tif"))
    source = source_of(paths, WIDE)
    return source, read_heights(source, WIDE, whole(WIDE.shape))


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_rasters_whose_place_misses_a_region_change_nothing(
    many: tuple[HeightSource, np.ndarray], data: st.DataObject
) -> None:
    source, wanted = many
    row, col = data.draw(st.integers(0, 279)), data.draw(st.integers(0, 289))
    height, width = data.draw(st.integers(1, 280 - row)), data.draw(st.integers(1, 290 - col))
    part = Region(row, col, height, width)
    there = [place(raster, WIDE) for raster in source.rasters]
    kept = [r for r, at in zip(source.rasters, there, strict=True) if at and at.intersect(part)]
    found = read_heights(replace(source, rasters=tuple(kept)), WIDE, part)
    np.testing.assert_array_equal(found, wanted[part.slices])


def test_a_place_holds_every_height_of_its_raster(many: tuple[HeightSource, np.ndarray]) -> None:
    source, _ = many
    for raster in source.rasters:
        alone = read_heights(replace(source, rasters=(raster,)), WIDE, whole(WIDE.shape))
        there = place(raster, WIDE)
        outside = np.isfinite(alone)
        if there:
            outside[there.slices] = False
        assert not outside.any()
        # Not much too large either: at most four pixels and what a source pixel is.
        rows, cols = np.nonzero(np.isfinite(alone))
        if there and rows.size:
            assert there.height - np.ptp(rows) < 30
            assert there.width - np.ptp(cols) < 30


def test_a_raster_far_away_has_no_place(tmp_path: Path) -> None:
    near = write_heights(tmp_path / "n.tif", rough(9, 9))
    raster = source_of(near).rasters[0]
    for crs, transform in (
        (CRS, (10.0, 0.0, LEFT + 5000.0, 0.0, -10.0, TOP)),
        ("EPSG:4326", (1e-3, 0.0, 100.0, 0.0, -1e-3, 38.0)),
        ("EPSG:32633", (10.0, 0.0, LEFT, 0.0, -10.0, TOP)),
    ):
        assert place(replace(raster, crs=crs, transform=transform), WIDE) is None
