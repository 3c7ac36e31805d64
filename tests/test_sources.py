"""Tiles: codes copied bit for bit whichever way up; every bad input named before work begins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from aeheight.embeddings import BANDS, NODATA, decode
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.sources import Ground, Sources, read_embeddings, scan
from aeheight.sources.areas import read_area
from aeheight.sources.tile import EmbeddingTile
from aeheight.windows import Region, whole
from aeheight.windows import tile as tile_squares
from tests.tifs import (
    CRS,
    DATA,
    LEFT,
    STEP,
    TOP,
    grid_of,
    height_settings,
    random_codes,
    region,
    write_heights,
    write_tif,
    write_tile,
)

RNG = np.random.default_rng(11)
CODES = random_codes(RNG, 40, 52)
"""The ground from (LEFT, TOP), 40 x 52 pixels."""
FLAT = np.full((40, 52), 50, np.float32)


def on_lattice(path: Path, grid: Grid) -> np.ndarray:
    """What rasterio itself says lies on a grid, by the coordinates of every pixel's centre."""
    out = np.full((BANDS, *grid.shape), NODATA, np.int8)
    with rasterio.open(path) as dataset:
        values, transform = dataset.read(), dataset.transform
    _, rows = transform @ (0.5, np.arange(values.shape[1]) + 0.5)
    cols, _ = transform @ (np.arange(values.shape[2]) + 0.5, 0.5)
    rows = np.floor((grid.top - rows) / grid.resolution).astype(int)
    cols = np.floor((cols - grid.left) / grid.resolution).astype(int)
    keep_rows = (rows >= 0) & (rows < grid.shape[0])
    keep_cols = (cols >= 0) & (cols < grid.shape[1])
    inside = values[:, keep_rows][:, :, keep_cols]
    out[:, rows[keep_rows][:, None], cols[keep_cols]] = inside
    return out


def one(settings: Any) -> Ground:
    """The plan of a region with one group."""
    (ground,) = scan(settings).grounds
    return ground


def read(settings: Any, year: int = 2021) -> np.ndarray:
    ground = one(settings)
    return read_embeddings(ground.embeddings, ground.grid, whole(ground.grid.shape), year)


# --- codes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["bottom-up", "north-up"])
def tile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tile")
    return write_tile(folder / "tile.tiff", CODES, bottom_up=request.param)


def test_a_tile_fixes_the_grid_and_its_codes_are_copied(tile: Path) -> None:
    ground = one(region(tile))
    assert ground.grid == grid_of(40, 52)
    assert ground.runs is None
    np.testing.assert_array_equal(read(region(tile)), CODES)
    (found,) = ground.embeddings.tiles
    assert (found.year, found.grid, found.block) == (
        2021,
        ground.grid,
        1 if tile_is_up(tile) else 16,
    )


def tile_is_up(tile: Path) -> bool:
    """Whether a bottom-up tile ends within a block: its blocks cannot be counted from the north."""
    with rasterio.open(tile) as dataset:
        return bool(dataset.transform.e > 0 and dataset.height % dataset.block_shapes[0][0])


@given(
    corner=st.tuples(st.integers(-20, 30), st.integers(-20, 40)),
    size=st.tuples(st.integers(30, 60), st.integers(30, 60)),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_window_is_what_rasterio_reads(
    tile: Path, corner: tuple[int, int], size: tuple[int, int], data: st.DataObject
) -> None:
    """Grids that reach past the tile, and regions anywhere in them."""
    ground = one(region(tile, grid_of(*size, *corner)))
    row, col = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    height = data.draw(st.integers(1, size[0] - row))
    width = data.draw(st.integers(1, size[1] - col))
    part = Region(row, col, height, width)
    grid = ground.grid
    found = read_embeddings(ground.embeddings, grid, part, 2021)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, on_lattice(tile, grid)[(slice(None), *part.slices)])


def test_where_tiles_overlap_the_first_valid_pixel_counts(tmp_path: Path) -> None:
    one, two = random_codes(RNG, 20, 30, 0.3), random_codes(RNG, 25, 30, 0.3)
    paths = [
        write_tile(tmp_path / "b.tiff", one, 0, 0),
        write_tile(tmp_path / "a.tiff", two, 10, 15, bottom_up=False),
    ]
    canvas = np.full((2, BANDS, 35, 45), NODATA, np.int8)
    canvas[0, :, :20, :30], canvas[1, :, 10:, 15:] = one, two
    for order in ([0, 1], [1, 0]):
        first, second = canvas[order]
        wanted = np.where(first[:1] == NODATA, second, first)
        np.testing.assert_array_equal(read(region([paths[i] for i in order])), wanted)
    # A folder is read in the order of the names: a.tiff first.
    np.testing.assert_array_equal(read(region(tmp_path)), wanted)
    np.testing.assert_array_equal(read(region(tmp_path / "*.tiff")), wanted)


def test_one_missing_band_makes_the_pixel_missing(tmp_path: Path) -> None:
    codes = random_codes(RNG, 16, 16, 0)
    codes[33, 4, 5] = NODATA
    found = read(region(write_tile(tmp_path / "t.tiff", codes)))
    assert (found[:, 4, 5] == NODATA).all()
    codes[:, 4, 5] = NODATA
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("missing", [np.nan, -9999.0, -3.4028234663852886e38, 0.0])
@pytest.mark.parametrize("bottom_up", [True, False])
def test_a_float_export_quantises_back_exactly(
    tmp_path: Path, dtype: str, missing: float, bottom_up: bool
) -> None:
    """Every code in every band, as Earth Engine writes it: sign(q) (|q| / 127.5)^2."""
    codes = np.empty((BANDS, 16, 17), np.int8)
    codes.reshape(BANDS, -1)[:, : 16 * 17] = np.resize(np.arange(-127, 128), 16 * 17)
    for band in range(BANDS):
        codes[band] = np.roll(codes[band], 7 * band)
    hole = np.zeros((16, 17), bool)
    hole[3, 4] = hole[9, :5] = True
    values = (np.sign(codes) * (np.abs(codes.astype(np.float64)) / 127.5) ** 2).astype(dtype)
    if missing == 0:  # a real value of code 0 would be missing as well
        hole |= (codes == 0).any(axis=0)
    values[:, hole] = missing
    declared = None if np.isnan(missing) else missing
    path = write_tile(tmp_path / "ee.tif", values, bottom_up=bottom_up, nodata=declared)
    codes[:, hole] = NODATA
    np.testing.assert_array_equal(read(region(path)), codes)


def test_a_float_export_with_an_undeclared_missing_value(tmp_path: Path) -> None:
    values = decode(random_codes(RNG, 8, 8, 0))
    values[:, 2, 3] = -9999
    path = write_tile(tmp_path / "ee.tif", values, nodata=None)
    with pytest.raises(InputError, match=r"ee\.tif: values like -9999 lie outside"):
        read(region(path))


# --- years --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, np.ndarray]]:
    folder = tmp_path_factory.mktemp("archive")
    years = {year: random_codes(RNG, 16, 20) for year in (2019, 2021)}
    for year, codes in years.items():
        write_tile(folder / str(year) / "10N" / "x-0000000000-0000000000.tiff", codes)
    return folder, years


@pytest.mark.parametrize("wanted", [2019, 2021, [2019, 2021], [2021, 2019, 2021]])
def test_years_come_from_the_path(
    archive: tuple[Path, dict[int, np.ndarray]], wanted: int | list[int]
) -> None:
    folder, years = archive
    ground = one(region(folder, year=wanted))
    asked = {wanted} if isinstance(wanted, int) else set(wanted)
    assert {tile.year for tile in ground.embeddings.tiles} == asked
    for year in asked:
        found = read_embeddings(ground.embeddings, ground.grid, whole(ground.grid.shape), year)
        np.testing.assert_array_equal(found, years[year])


def test_a_year_that_no_tile_has(archive: tuple[Path, dict[int, np.ndarray]]) -> None:
    with pytest.raises(InputError, match=r"no tile of \[2020\].*there are \[2019, 2021\]"):
        scan(region(archive[0], year=[2019, 2020]))


def test_a_path_without_a_year_stands_for_the_one_asked(tile: Path) -> None:
    assert one(region(tile, year=2017)).embeddings.tiles[0].year == 2017
    with pytest.raises(InputError, match=r"tile\.tiff: its path names no year.*YEAR/ZONE"):
        scan(region(tile, year=[2017, 2018]))


# --- the grid -----------------------------------------------------------------------------------


def test_the_grid_is_drawn_around_all_tiles(tmp_path: Path) -> None:
    write_tile(tmp_path / "a.tiff", random_codes(RNG, 16, 16), 5, 40)
    write_tile(tmp_path / "b.tiff", random_codes(RNG, 20, 16), -30, 2, bottom_up=False)
    assert one(region(tmp_path)).grid == grid_of(51, 54, -30, 2)


def degrees(grid: Grid) -> list[float]:
    """Bounds in degrees that lie just inside a grid's own."""
    w, s, e, n = grid.bounds
    to_degrees = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    xs, ys = to_degrees.transform([w + 1, e - 1], [s + 1, n - 1])
    return [xs[0], ys[0], xs[1], ys[1]]


def ring(bounds: list[float]) -> dict[str, Any]:
    w, s, e, n = bounds
    return {"type": "Polygon", "coordinates": [[[w, s], [e, s], [e, n], [w, n], [w, s]]]}


@pytest.mark.parametrize("shape", ["bounds", "geometry", "feature", "collection"])
def test_aoi_bounds_the_grid(tile: Path, tmp_path: Path, shape: str) -> None:
    wanted = grid_of(12, 15, 10, 20)
    aoi: Any = degrees(wanted)
    if shape != "bounds":
        described = ring(aoi)
        if shape != "geometry":
            described = {"type": "Feature", "properties": {}, "geometry": described}
        if shape == "collection":
            described = {"type": "FeatureCollection", "features": [described]}
        aoi = str(tmp_path / "aoi.geojson")
        Path(aoi).write_text(json.dumps(described))
    ground = one(region(tile, aoi=aoi))
    grid = ground.grid
    row, col = wanted.offset(grid.left, grid.top)
    # Whole pixels of the tiles' lattice, and a pixel more where the meridian leans.
    assert (row, col) == (round(row), round(col))
    assert -2 <= row <= 0
    assert -2 <= col <= 0
    assert 12 <= grid.shape[0] <= 14
    assert 15 <= grid.shape[1] <= 17
    found = read_embeddings(ground.embeddings, grid, whole(grid.shape), 2021)
    np.testing.assert_array_equal(found, on_lattice(tile, grid))


def test_aoi_fixes_the_grid_where_tiles_may_still_come(tile: Path) -> None:
    """A tile that is delivered later must not move the grid; shards without a tile are not made."""
    ground = one(region(tile, aoi=degrees(wanted := grid_of(400, 400, -100, -100)),
                        cube={"shard": 64, "chunk": 32}))  # fmt: skip
    row, col = wanted.offset(ground.grid.left, ground.grid.top)
    assert -20 <= row <= 0
    assert -20 <= col <= 0
    assert ground.runs is not None
    assert 1 <= len(list(tile_squares(ground.grid.shape, 64, ground.runs))) <= 4


@pytest.mark.parametrize(
    "aoi",
    [
        pytest.param([10.0, 50.0, 10.1, 50.1], id="elsewhere"),
        pytest.param([-122.1, 38.66, -122.11, 38.65], id="south above north"),
        pytest.param([LEFT, TOP - 100, LEFT + 100, TOP], id="metres"),
        pytest.param("nowhere.geojson", id="no file"),
    ],
)
def test_bad_aoi(tile: Path, aoi: Any) -> None:
    with pytest.raises(InputError, match="aoi"):
        scan(region(tile, aoi=aoi))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"type": "Point"}', '{"coordinates": [["a"]]}'])
def test_bad_aoi_files(tile: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "aoi.geojson"
    path.write_text(text)
    with pytest.raises(InputError, match=r"aoi: .*aoi\.geojson is no GeoJSON"):
        scan(region(tile, aoi=str(path)))


# --- bad input ----------------------------------------------------------------------------------

NORTH_UP = Affine(STEP, 0, LEFT, 0, -STEP, TOP)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (CODES[:63], {}, "63 bands instead of 64"),
        (CODES.view(np.uint8), {}, "uint8 instead of int8"),
        (CODES.astype(np.int16), {}, "int16 instead of int8"),
        (CODES, {"crs": None}, "no CRS.*gdal_edit"),
        (CODES, {"nodata": 0}, "nodata is 0 instead of -128"),
        (CODES, {"transform": Affine(10, 0, LEFT, 0, -20, TOP)}, "10.0 x 20.0, not square"),
        (CODES, {"transform": NORTH_UP @ Affine.rotation(30)}, "rotated.*warp it north-up"),
        (CODES, {"transform": Affine(0, 10, LEFT, 10, 0, TOP)}, "rotated.*warp it north-up"),
    ],
    ids=["bands", "unsigned", "int16", "no crs", "nodata", "oblong", "rotated", "transposed"],
)
def test_what_is_no_tile(
    tmp_path: Path, codes: np.ndarray, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "strange.tiff"
    write_tif(path, codes, **({"transform": NORTH_UP, "crs": CRS, "nodata": None} | options))
    with pytest.raises(InputError, match=rf"strange\.tiff is no AlphaEarth tile: .*{message}"):
        scan(region(path))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for href in (tmp_path / "gone.tiff", tmp_path / "empty", tmp_path / "*.tiff"):
        with pytest.raises(InputError, match=r"embeddings\.href: .* names no raster") as caught:
            scan(region(href))
        assert str(href) in str(caught.value)


def test_a_file_that_is_no_raster(tmp_path: Path) -> None:
    path = tmp_path / "text.tiff"
    path.write_text("no raster")
    with pytest.raises(InputError, match=r"text\.tiff cannot be opened as a raster"):
        scan(region(path))


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_tile_is_met_at_the_plan(tile: Path, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.tiff"
    path.write_bytes(tile.read_bytes()[: int(tile.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"cut\.tiff"):
        scan(region(path))


def test_a_file_that_is_not_what_the_plan_saw(tile: Path, tmp_path: Path) -> None:
    path = write_tile(tmp_path / "t.tiff", CODES)
    ground = one(region(path))
    write_tile(path, CODES, 3, 3)
    with pytest.raises(OSError, match=r"t\.tiff is not what the plan saw.*plan again"):
        read_embeddings(ground.embeddings, ground.grid, whole(ground.grid.shape), 2021)


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param(Grid(CRS, STEP, LEFT + 3, TOP, (20, 20)), id="shifted"),
        pytest.param(Grid(CRS, 20.0, LEFT, TOP, (20, 20)), id="coarser"),
        pytest.param(Grid(CRS, STEP, LEFT, TOP - 0.5, (20, 20)), id="half a metre off"),
    ],
)
def test_a_grid_off_the_tiles_lattice(tile: Path, grid: Grid) -> None:
    with pytest.raises(InputError, match=r"not on the grid's lattice.*leave grid out"):
        scan(region(tile, grid))


def test_a_later_tile_off_the_lattice_is_met_at_the_plan(tile: Path, tmp_path: Path) -> None:
    shifted = Affine(STEP, 0, LEFT + 3, 0, -STEP, TOP)
    other = write_tif(tmp_path / "shifted.tiff", CODES, shifted, nodata=NODATA)
    with pytest.raises(InputError, match=r"shifted\.tiff.*lattice"):
        scan(region([tile, other], grid_of(20, 20)))


def test_a_tile_in_another_crs_than_the_grid(tile: Path) -> None:
    w, _, _, n = Transformer.from_crs(CRS, "EPSG:32611", always_xy=True).transform_bounds(
        *grid_of(40, 52).bounds
    )
    with pytest.raises(InputError, match=r"EPSG:32610.*lattice.*EPSG:32611"):
        scan(region(tile, Grid("EPSG:32611", STEP, float(w), float(n), (60, 60))))


def test_with_a_grid_a_tile_far_away_in_another_zone_is_left_alone(
    tile: Path, tmp_path: Path
) -> None:
    other = write_tile(tmp_path / "other.tiff", CODES, crs="EPSG:32611")
    assert len(scan(region([tile, other])).grounds) == 2
    assert len(one(region([tile, other], grid_of(20, 20))).embeddings.tiles) == 1


def test_tiles_of_several_resolutions(tile: Path, tmp_path: Path) -> None:
    coarse = Affine(20.0, 0, LEFT, 0, -20.0, TOP)
    other = write_tif(tmp_path / "coarse.tiff", CODES, coarse, nodata=NODATA)
    with pytest.raises(InputError, match=r"several resolutions.*tile\.tiff.*coarse\.tiff"):
        scan(region([tile, other]))


def test_tiles_of_two_years_that_do_not_say_so(tile: Path, tmp_path: Path) -> None:
    with rasterio.open(tile) as dataset:
        up = dataset.transform.e > 0
    other = write_tile(tmp_path / "next_year.tiff", CODES, bottom_up=up)
    with pytest.raises(InputError, match=r"tile\.tiff and .*next_year\.tiff cover the same ground"):
        scan(region([tile, other]))


def test_a_grid_that_misses_the_tiles(tile: Path) -> None:
    for grid in (grid_of(20, 20, 500, 0), grid_of(20, 20, 40, 0), grid_of(20, 20, 0, 52)):
        with pytest.raises(InputError, match=r"no tile touches the grid.*grid\.bounds"):
            scan(region(tile, grid))


def test_heights_elsewhere(tile: Path, tmp_path: Path) -> None:
    dsm = write_heights(tmp_path / "dsm.tif", FLAT, left=LEFT + 5000)
    with pytest.raises(InputError, match=r"height: none of its 1 rasters touches.*share ground"):
        scan(region(tile, height=height_settings(dsm)))


def test_tiles_and_heights_in_two_corners_of_the_grid(tile: Path, tmp_path: Path) -> None:
    dsm = write_heights(tmp_path / "dsm.tif", FLAT, left=LEFT + 1000)
    with pytest.raises(InputError, match=r"nowhere the same ground.*dsm\.tif"):
        scan(region(tile, grid_of(40, 200), height=height_settings(dsm)))


# --- the plan as a value, and areas -------------------------------------------------------------


def test_sources_survive_their_json(tile: Path, tmp_path: Path) -> None:
    dsm = write_heights(tmp_path / "dsm.tif", FLAT)
    wanted = region(tile, height=height_settings(dsm), prior=height_settings([dsm, dsm]))
    sources = scan(wanted)
    assert Sources.from_bytes(sources.to_bytes()) == sources
    (ground,) = Sources.from_bytes(sources.to_bytes()).grounds
    assert isinstance(ground.embeddings.tiles[0], EmbeddingTile)
    assert ground.prior is not None
    assert len(ground.prior.rasters) == 1
    assert sources.files == {"embeddings": [str(tile)], "height": [str(dsm)], "prior": [str(dsm)]}


def test_area_of_bounds_and_of_a_geojson_file(tile: Path, tmp_path: Path) -> None:
    grid = grid_of(40, 52)
    bounds = (LEFT + 100, TOP - 300, LEFT + 250, TOP - 100)
    inside = np.zeros(grid.shape, bool)
    inside[10:30, 10:25] = True
    np.testing.assert_array_equal(read_area(region(tile), bounds, grid), inside)
    path = tmp_path / "half.geojson"
    to_degrees = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
    corners = [(bounds[0], bounds[1]), (bounds[2], bounds[1]), (bounds[2], bounds[3]),
               (bounds[0], bounds[3]), (bounds[0], bounds[1])]  # fmt: skip
    polygon = {"type": "Polygon", "coordinates": [[to_degrees.transform(*c) for c in corners]]}
    feature = {"type": "Feature", "properties": {}, "geometry": polygon}
    for shape in (polygon, feature, {"type": "FeatureCollection", "features": [feature]}):
        path.write_text(json.dumps(shape))
        np.testing.assert_array_equal(read_area(region(tile), str(path), grid), inside)
    assert read_area(region(tile), 0.3, grid) == 0.3


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"type": "Feature"}', '{"features": [1]}'])
def test_bad_area_files(tile: Path, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "half.geojson"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"split: .*half\.geojson is no GeoJSON"):
        read_area(region(tile), str(path), grid_of(4, 4))


# --- real data ----------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside the project")
def test_a_real_bottom_up_tile_equals_the_north_up_one() -> None:
    folder = DATA / "wisconsin_10m"
    exact = folder / "aef_wi_1km_2024_utm16n_int8_exact.tif"
    grid = one(region(exact, year=2024)).grid
    wanted = read(region(exact, year=2024), 2024)
    found = read(region(folder / "aef_format_bottomup_128px.tif", grid, year=2024), 2024)
    assert (wanted[0] != NODATA).mean() > 0.9
    np.testing.assert_array_equal(found, wanted)
    norms = np.linalg.norm(decode(found)[:, found[0] != NODATA], axis=0)
    assert norms.min() > 0.99
    assert norms.max() < 1.01
