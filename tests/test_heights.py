"""Heights on the grid: means of what is valid, bilinear without a shift, the same for any cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer
from rasterio.warp import transform_bounds

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.sources.heights import HeightSource, read_heights
from aeheight.windows import Region, whole
from tests.tifs import (
    CRS,
    DATA,
    GRID,
    LEFT,
    RNG,
    STEP,
    TOP,
    block_mean,
    grid_of,
    read,
    source_of,
    terrain,
    write_heights,
)

MISSING = [-9999.0, -32768.0, np.nan, 0.0]


def bilinear(
    values: np.ndarray, left: float, top: float, step: float, grid: Grid, crs: str = CRS
) -> np.ndarray:
    """By hand, between pixel centres; NaN where one of the four is missing."""
    to_source = Transformer.from_crs(grid.crs, crs, always_xy=True)
    x, y = to_source.transform(*np.meshgrid(grid.x(), grid.y()))
    rows, cols = (top - y) / step + 1.5, (x - left) / step + 1.5
    padded = np.pad(values.astype(np.float64), 2, constant_values=np.nan)
    row = np.clip(np.floor(rows).astype(int), 0, padded.shape[0] - 2)
    col = np.clip(np.floor(cols).astype(int), 0, padded.shape[1] - 2)
    v, u = rows - row, cols - col
    north = (1 - u) * padded[row, col] + u * padded[row, col + 1]
    south = (1 - u) * padded[row + 1, col] + u * padded[row + 1, col + 1]
    return (1 - v) * north + v * south


# --- a finer source -----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", MISSING)
def test_a_finer_source_is_the_mean_of_what_is_valid(tmp_path: Path, missing: float) -> None:
    heights = terrain(150, 180, holes=0.3)
    heights[20:35, 40:60] = np.nan  # whole pixels of the grid without a height
    path = write_heights(tmp_path / "dsm.tif", heights, step=2.0, nodata=missing)
    wanted = block_mean(heights, 5)
    assert np.isnan(wanted).any()
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 7.0, -4.0])
def test_a_finer_source_that_does_not_divide_is_weighted_by_area(
    tmp_path: Path, offset: float
) -> None:
    """3 m pixels cut into 1 m pixels give the same mean; so does any offset."""
    heights = terrain(110, 130)
    path = write_heights(tmp_path / "dsm.tif", heights, LEFT + offset, TOP - offset, 3.0)
    metres = np.kron(heights, np.ones((3, 3)))
    canvas = np.full((400, 500), np.nan)
    canvas[10 + int(offset) : 340 + int(offset), 10 + int(offset) : 400 + int(offset)] = metres
    found, wanted = read(path), block_mean(canvas[10:, 10:], 10)[:30, :36]
    # The raster's own edge cuts the first pixels.
    np.testing.assert_allclose(found[2:, 2:], wanted[2:, 2:], rtol=2e-6)


def test_bottom_up_heights(tmp_path: Path) -> None:
    heights = terrain(60, 72)
    path = tmp_path / "dsm.tif"
    transform = Affine(5, 0, LEFT, 0, 5, TOP - 300)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=60, width=72, dtype="float32",
        crs=CRS, transform=transform,
    ) as target:  # fmt: skip
        target.write(heights[::-1], 1)
    np.testing.assert_allclose(read(path), block_mean(heights, 2), rtol=1e-6)


# --- a coarser source ---------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 4.0, -13.0])
def test_a_coarser_source_is_bilinear(tmp_path: Path, offset: float) -> None:
    heights = terrain(16, 18)
    left, top = LEFT - 60 + offset, TOP + 60 + offset
    path = write_heights(tmp_path / "prior.tif", heights, left, top, 30.0)
    wanted = bilinear(heights, left, top, 30.0, GRID)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)


def test_a_plane_in_degrees_stays_that_plane(tmp_path: Path) -> None:
    """Half a pixel of shift would be 15 m x 0.1 = 1.5 m of height."""
    step = 1 / 3600
    west, south, east, north = transform_bounds(CRS, "EPSG:4326", *GRID.bounds)
    left, top = west - 5 * step, north + 5 * step
    shape = round((north - south) / step) + 12, round((east - west) / step) + 12
    rows, cols = np.mgrid[: shape[0], : shape[1]] + 0.5

    def plane(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        return 300 + 8_000 * (lon - west) + 11_000 * (lat - south)

    values = plane(left + cols * step, top - rows * step).astype(np.float32)
    path = write_heights(tmp_path / "prior.tif", values, left, top, step, None, "EPSG:4326")
    x, y = np.meshgrid(GRID.x(), GRID.y())
    lon, lat = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True).transform(x, y)
    np.testing.assert_allclose(read(path), plane(lon, lat), atol=0.005)


def test_a_prior_of_the_whole_world_touches_the_grid(tmp_path: Path) -> None:
    heights = terrain(180, 360)
    path = write_heights(tmp_path / "w.tif", heights, -180.0, 90.0, 1.0, None, "EPSG:4326")
    wanted = bilinear(heights, -180, 90, 1, GRID, "EPSG:4326")
    np.testing.assert_allclose(read(path), wanted, rtol=1e-5)


@pytest.mark.parametrize("west", [179.99, -179.9999], ids=["across", "east of it"])
def test_a_grid_at_the_180th_meridian(tmp_path: Path, west: float) -> None:
    heights = np.full((40, 40), 7.0, np.float32)
    path = write_heights(tmp_path / "p.tif", heights, -180.0, -16.0, 0.001, None, "EPSG:4326")
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32701", always_xy=True).transform(west, -16.01)
    found = read(path, Grid("EPSG:32701", STEP, round(x), round(y), (20, 200)))
    assert np.isfinite(found).any()
    assert np.isfinite(found[:, -50:]).all()
    assert set(found[np.isfinite(found)]) == {7.0}


# --- missing heights ----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("step", [2.0, 3.0, 10.0, 17.0, 30.0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_nodata_never_bleeds_into_a_value(
    tmp_path: Path, missing: float, step: float, shift: float
) -> None:
    """All that is valid is 100 m: then so is every height, finer, coarser or the same."""
    edge = round(400 / step)
    heights = np.full((edge, edge), 100, np.float32)
    heights[RNG.random((edge, edge)) < 0.3] = np.nan
    path = write_heights(tmp_path / "d.tif", heights, LEFT - shift, TOP + shift, step, missing)
    found = read(path)
    assert np.isfinite(found).any()
    np.testing.assert_allclose(found[np.isfinite(found)], 100, rtol=1e-7)


def test_whole_numbers_and_their_nodata(tmp_path: Path) -> None:
    heights = RNG.integers(0, 3000, (60, 72)).astype(np.int16)
    heights[RNG.random(heights.shape) < 0.2] = -32768
    path = write_heights(tmp_path / "dsm.tif", heights, step=5.0, nodata=-32768)
    masked = np.where(heights == -32768, np.nan, heights)
    np.testing.assert_allclose(read(path), block_mean(masked, 2), rtol=1e-6)
    heights[heights == -32768] = 0
    none = write_heights(tmp_path / "none.tif", heights, step=5.0, nodata=None)
    np.testing.assert_allclose(read(none), block_mean(heights, 2), rtol=1e-6)


@pytest.mark.parametrize("step", [2.0, 10.0, 30.0])
@pytest.mark.parametrize("strange", [-9999.0, -32767.0, 32767.0, 3.4e38])
def test_an_undeclared_missing_value_is_named(tmp_path: Path, step: float, strange: float) -> None:
    """One among many heights gives a mean that looks like a height: it is met all the same."""
    edge = round(420 / step)
    heights = np.full((edge, edge), 600, np.float32)
    heights[edge // 3, edge // 3] = strange
    path = write_heights(tmp_path / "void.tif", heights, LEFT - 30, TOP + 30, step, nodata=None)
    with pytest.raises(InputError, match=r"void\.tif.*name it in `nodata`"):
        read(path)
    heights[heights == strange] = np.nan
    declared = write_heights(tmp_path / "ok.tif", heights, LEFT - 30, TOP + 30, step)
    np.testing.assert_array_equal(read(path, nodata=float(np.float32(strange))), read(declared))


# --- the same lattice ---------------------------------------------------------------------------


def test_the_same_lattice_is_copied_bit_for_bit(tmp_path: Path) -> None:
    heights = terrain(30, 36, holes=0.2)
    heights[0, :3] = [-0.0, 1e-40, np.float32(0.1)]
    path = write_heights(tmp_path / "dsm.tif", heights)
    np.testing.assert_array_equal(read(path).view(np.uint32), heights.view(np.uint32))


def test_past_the_raster_there_is_nothing(tmp_path: Path) -> None:
    heights = terrain(10, 12)
    path = write_heights(tmp_path / "dsm.tif", heights, LEFT + 100, TOP - 50)
    wanted = np.full(GRID.shape, np.nan, np.float32)
    wanted[5:15, 10:22] = heights
    np.testing.assert_array_equal(read(path), wanted)


# --- the cut ------------------------------------------------------------------------------------

WIDE = grid_of(280, 290)
"""More than one of the squares that heights are warped on."""


@pytest.fixture(
    scope="module", params=["5 m", "3 m shifted", "30 m", "degrees", "other zone", "two files"]
)
def wide_reading(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HeightSource, np.ndarray]:
    """A source, and its heights on the whole grid read at once."""
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "dsm.tif"
    paths: list[Path] = [path]
    if request.param == "5 m":
        write_heights(path, terrain(560, 580, 0.1), step=5.0)
    elif request.param == "3 m shifted":
        write_heights(path, terrain(940, 970, 0.1), LEFT + 1, TOP + 2, 3.0)
    elif request.param == "30 m":
        write_heights(path, terrain(100, 100, 0.1), LEFT - 31, TOP + 17, 30.0)
    elif request.param == "degrees":
        west, _, _, north = transform_bounds(CRS, "EPSG:4326", *WIDE.bounds)
        write_heights(
            path, terrain(110, 130, 0.1), west - 1e-3, north + 1e-3, 1 / 3600, crs="EPSG:4326"
        )
    elif request.param == "other zone":
        x, y = Transformer.from_crs(CRS, "EPSG:32611", always_xy=True).transform(LEFT, TOP)
        write_heights(path, terrain(900, 900, 0.1), x - 100, y + 100, 4.0, crs="EPSG:32611")
    else:
        write_heights(path, terrain(700, 800, 0.1), step=3.0)
        paths.append(write_heights(folder / "e.tif", terrain(100, 100), LEFT + 99, step=25.0))
    source = source_of(paths, WIDE)
    return source, read_heights(source, WIDE, whole(WIDE.shape))


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_heights_do_not_depend_on_the_cut(
    wide_reading: tuple[HeightSource, np.ndarray], data: st.DataObject
) -> None:
    """Bit for bit, down to a single pixel, from which GDAL would take a wrong scale."""
    source, wanted = wide_reading
    row, col = data.draw(st.integers(0, 279)), data.draw(st.integers(0, 289))
    height, width = data.draw(st.integers(1, 280 - row)), data.draw(st.integers(1, 290 - col))
    part = Region(row, col, height, width)
    found = read_heights(source, WIDE, part)
    np.testing.assert_array_equal(found, wanted[part.slices])


def test_a_wide_reading_has_no_seams(tmp_path: Path) -> None:
    fine = terrain(560, 580)
    path = write_heights(tmp_path / "fine.tif", fine, step=5.0)
    np.testing.assert_allclose(read(path, WIDE), block_mean(fine, 2), rtol=1e-6)
    coarse = terrain(105, 105)
    path = write_heights(tmp_path / "coarse.tif", coarse, LEFT - 61, TOP + 77, 30.0)
    wanted = bilinear(coarse, LEFT - 61, TOP + 77, 30.0, WIDE)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(read(path, WIDE), wanted, rtol=1e-6)


# --- several rasters, and what they are ---------------------------------------------------------


def test_of_several_rasters_the_first_valid_height_counts(tmp_path: Path) -> None:
    one, two = terrain(30, 20, 0.3), terrain(30, 30, 0.3)
    paths = [
        write_heights(tmp_path / "b.tif", one),
        write_heights(tmp_path / "a.tif", two, LEFT + 60),
    ]
    canvas = np.full((2, *GRID.shape), np.nan, np.float32)
    canvas[0, :, :20], canvas[1, :, 6:] = one, two
    for order in ([0, 1], [1, 0]):
        first, second = canvas[order]
        wanted = np.where(np.isnan(first), second, first)
        np.testing.assert_array_equal(read([paths[i] for i in order]), wanted)
    np.testing.assert_array_equal(read(tmp_path), wanted)


def test_each_raster_is_resampled_by_its_own_resolution(tmp_path: Path) -> None:
    fine, coarse = terrain(60, 36), terrain(20, 20)
    paths = [
        write_heights(tmp_path / "fine.tif", fine, step=5.0),
        write_heights(tmp_path / "coarse.tif", coarse, LEFT - 40, TOP + 40, 40.0),
    ]
    found = read(paths)
    np.testing.assert_allclose(found[:, :18], block_mean(fine, 2), rtol=1e-6)
    wanted = bilinear(coarse, LEFT - 40, TOP + 40, 40, GRID)
    np.testing.assert_allclose(found[:, 18:], wanted[:, 18:], rtol=1e-6)


@pytest.mark.parametrize("kind", ["Area", "Point"])
def test_pixel_is_point_is_not_shifted(tmp_path: Path, kind: str) -> None:
    """GDAL has moved the corner already: the tag changes nothing for whoever trusts it."""
    heights = terrain(16, 18)
    path = write_heights(tmp_path / "prior.tif", heights, LEFT - 60, TOP + 60, 30.0)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(AREA_OR_POINT=kind)
    with rasterio.open(path) as dataset:
        assert dataset.tags()["AREA_OR_POINT"] == kind
    wanted = bilinear(heights, LEFT - 60, TOP + 60, 30.0, GRID)
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_heights(p, np.ones((3, 9, 9), np.float32)), "3 bands; a height model"),
        (lambda p: write_heights(p, np.ones((9, 9), np.float32), crs=None), "no CRS"),
        (lambda p: p.write_text("text"), "cannot be opened as a raster"),
        (lambda p: None, r"height\.href: .* names no raster"),
    ],
    ids=["bands", "no crs", "text", "missing"],
)
def test_what_is_no_height_model(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "strange.tif")
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "strange.tif")
    assert "strange.tif" in str(caught.value)


def test_scaled_values_are_refused(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "cm.tif", np.full((30, 36), 30_000, np.int16), nodata=None)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.01,)
    with pytest.raises(InputError, match=r"cm\.tif: .*scaled \(0\.01\).*-unscale"):
        read(path)


def test_a_mask_inside_the_file_counts(tmp_path: Path) -> None:
    heights = terrain(60, 72)
    path = write_heights(tmp_path / "dsm.tif", heights, step=5.0, nodata=None)
    hidden = np.zeros(heights.shape, bool)
    hidden[10:21, 30:] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write(np.where(hidden, np.float32(8000), heights), 1)
        dataset.write_mask(~hidden)
    wanted = block_mean(np.where(hidden, np.nan, heights), 2)
    np.testing.assert_allclose(read(path), wanted, rtol=1e-6)


def test_a_truncated_raster_breaks_off_with_its_name(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "cut.tif", terrain(600, 720), step=0.5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=r"cut\.tif breaks off"):
        read(path)


# --- real data ----------------------------------------------------------------------------------

real = pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside the project")


@real
def test_a_real_lidar_surface_averages_like_numpy() -> None:
    path = DATA / "dsm" / "dc_lidar_2m" / "dsm.tif"
    with rasterio.open(path) as dataset:
        heights = dataset.read(1)
        missing, (left, _, _, top) = dataset.nodata, dataset.bounds
    wanted = block_mean(np.where(heights == missing, np.nan, heights), 5)
    grid = Grid("EPSG:26918", STEP, left, top, wanted.shape)
    np.testing.assert_allclose(read(path, grid), wanted, rtol=1e-5)


@real
def test_a_real_prior_in_degrees_is_bilinear() -> None:
    path = DATA / "dsm" / "glo30_dangermond" / "preserve_dem_30m_wgs84.tif"
    x, y = Transformer.from_crs("EPSG:4326", CRS, always_xy=True).transform(-120.44, 34.52)
    grid = Grid(CRS, STEP, round(x), round(y), (300, 280))
    with rasterio.open(path) as dataset:
        heights, corner = dataset.read(1), dataset.transform
    wanted = bilinear(heights, corner.c, corner.f, corner.a, grid, "EPSG:4326")
    found = read(path, grid)
    assert np.ptp(found) > 100
    np.testing.assert_allclose(found, wanted, atol=0.002)
