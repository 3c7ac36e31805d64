"""The global mosaic: its own lattice, codes copied, whichever way up and however time is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from aeheight.embeddings import BAND_NAMES, BANDS, NODATA
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import AccessSettings, RegionSettings
from aeheight.sources.mosaic import read_mosaic, scan_mosaic
from aeheight.sources.tile import EmbeddingSource
from aeheight.sources.tiles import read_embeddings
from aeheight.windows import Region, whole
from tests.tifs import random_codes, region

RNG = np.random.default_rng(31)
STEP = 8.983111749910169e-05
GRID = Grid("EPSG:4326", STEP, -122.5, 83.68570533713473, (70, 90))
CODES = np.stack([random_codes(RNG, 70, 90) for _ in range(3)])
"""Three years, of which shards are 32 and chunks 16 pixels wide: the last ones are cut."""
YEARS = (2019, 2020, 2021)
DIMENSIONS = ("time", "band", "y", "x")


def write_mosaic(
    path: Path,
    *,
    grid: Grid = GRID,
    codes: np.ndarray = CODES,
    ascending: bool = False,
    time: tuple[Any, dict[str, Any]] = (np.array(YEARS), {}),
    consolidated: bool = True,
    attributes: dict[str, Any] | None = None,
    coordinates: bool = True,
    shift: float = 0.0,
    fill: int = NODATA,
    name: str = "embeddings",
    dimensions: tuple[str, ...] = DIMENSIONS,
    bands: Any = None,
) -> Path:
    """A store in the real layout: Zarr v3, shards of all bands, GeoZarr attributes."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    left, top = grid.left, grid.top
    if attributes is None:
        rise = [STEP, top - grid.shape[0] * STEP] if ascending else [-STEP, top]
        attributes = {"proj:code": "EPSG:4326", "spatial:transform": [STEP, 0, left, 0, *rise]}
    group.attrs.update(attributes)
    count = codes.shape[1]
    array = group.create_array(
        name, shape=codes.shape, dtype=codes.dtype, shards=(1, count, 32, 32),
        chunks=(1, count, 16, 16), dimension_names=dimensions, fill_value=fill,
    )  # fmt: skip
    array[:] = codes[:, :, ::-1] if ascending else codes
    y = grid.y()[::-1] if ascending else grid.y()
    if coordinates:
        for axis, values in (("x", grid.x()), ("y", y)):
            group.create_array(axis, data=values + shift * STEP, dimension_names=(axis,))
    values, attrs = time
    group.create_array("time", data=values, dimension_names=("time",)).attrs.update(attrs)
    if bands is not None:
        group.create_array("band", data=bands, dimension_names=("band",))
    if consolidated:
        with pytest.warns(Warning, match="onsolidated"):
            zarr.consolidate_metadata(path)
    return path


def settings(href: Any, year: Any = 2020) -> RegionSettings:
    return region("x.tif", embeddings={"source": "mosaic", "href": str(href), "year": year})


@pytest.fixture(scope="module", params=[False, True], ids=["descending", "ascending"])
def mosaic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mosaic(tmp_path_factory.mktemp("mosaic") / "m.zarr", ascending=request.param)


def test_a_tile_a_year_on_the_lattice_of_the_mosaic(mosaic: Path) -> None:
    tiles = scan_mosaic(settings(mosaic, [2021, 2019]))
    assert [(t.year, t.kind, t.block, t.href) for t in tiles] == [
        (2019, "zarr", 16, str(mosaic)),
        (2021, "zarr", 16, str(mosaic)),
    ]
    for tile in tiles:
        assert (tile.grid.crs, tile.grid.resolution, tile.grid.shape) == (GRID.crs, STEP, (70, 90))
        assert tile.grid.bounds == pytest.approx(GRID.bounds, abs=1e-9)


@given(data=st.data(), year=st.sampled_from(YEARS))
@hypothesis_settings(max_examples=30, deadline=None)
def test_any_window_is_copied_north_up(mosaic: Path, data: st.DataObject, year: int) -> None:
    (tile,) = scan_mosaic(settings(mosaic, year))
    row, col = data.draw(st.integers(0, 69)), data.draw(st.integers(0, 89))
    part = Region(
        row, col, data.draw(st.integers(1, 70 - row)), data.draw(st.integers(1, 90 - col))
    )
    wanted = CODES[(YEARS.index(year), slice(None), *part.slices)]
    access = AccessSettings()
    found = read_mosaic(tile.href, tile.grid, part, year, access)
    assert found.dtype == np.int8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, wanted)
    # A region's own grid starts anywhere on the lattice, and may reach past the mosaic.
    grid = tile.grid.part(Region(row - 5, col - 3, 80, 100))
    whole_region = read_embeddings(EmbeddingSource((tile,), access), grid, whole(grid.shape), year)
    canvas = np.full((BANDS, 80 + 75, 100 + 95), NODATA, np.int8)
    canvas[:, 5 : 5 + 70, 3 : 3 + 90] = CODES[YEARS.index(year)]
    np.testing.assert_array_equal(whole_region, canvas[:, row : row + 80, col : col + 100])


@pytest.mark.parametrize(
    "time",
    [
        (np.array(YEARS, np.int16), {}),
        (np.array(YEARS, np.float64), {}),
        (np.array([f"{y}-01-01" for y in YEARS], "datetime64[D]").astype("int64"),
         {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}),
        (np.array([0, 366 * 24, 731 * 24]) - 24, {"units": "hours since 2019-01-02 00:00:00"}),
    ],
    ids=["years", "float years", "days", "hours"],
)  # fmt: skip
def test_how_time_is_told(tmp_path: Path, time: Any) -> None:
    path = write_mosaic(tmp_path / "m", time=time, consolidated=False)
    assert [tile.year for tile in scan_mosaic(settings(path, [*YEARS]))] == [*YEARS]


@pytest.mark.filterwarnings("ignore:The data type .*datetime64")
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_datetimes(tmp_path: Path) -> None:
    time = np.array([f"{y}-01-01" for y in YEARS], "datetime64[ns]")
    path = write_mosaic(tmp_path / "m", time=(time, {}), consolidated=False)
    (tile,) = scan_mosaic(settings(path, 2021))
    found = read_mosaic(tile.href, tile.grid, Region(0, 0, 2, 2), 2021, AccessSettings())
    np.testing.assert_array_equal(found, CODES[2, :, :2, :2])


def test_where_the_lattice_is_told(tmp_path: Path) -> None:
    """By coordinates alone, by the transform alone, by a CF grid mapping."""
    alone = write_mosaic(tmp_path / "a", attributes={"proj:code": "EPSG:4326"})
    bare = write_mosaic(tmp_path / "b", coordinates=False)
    mapped = write_mosaic(tmp_path / "c", attributes={"note": "no GeoZarr"}, consolidated=False)
    group = zarr.open_group(mapped, mode="r+")
    group["embeddings"].attrs["grid_mapping"] = "spatial_ref"
    at = group.create_array("spatial_ref", shape=(), dtype="i4")
    wkt = zarr.open_group(alone, mode="r").attrs["proj:code"]
    at.attrs.update({"crs_wkt": wkt, "GeoTransform": f"{GRID.left} {STEP} 0 {GRID.top} 0 {-STEP}"})
    for path in (alone, bare, mapped):
        (tile,) = scan_mosaic(settings(path))
        assert (tile.grid.crs, tile.grid.shape) == ("EPSG:4326", (70, 90))
        assert tile.grid.bounds == pytest.approx(GRID.bounds, abs=1e-9)
        assert tile.grid.resolution == pytest.approx(STEP, rel=1e-12)


def test_ground_that_was_never_written(tmp_path: Path) -> None:
    """Missing shards are nodata, also where the store fills in zeros; a code of 0 stays."""
    codes = np.full((1, BANDS, 70, 90), 0, np.int8)
    codes[0, :, :20, :20] = RNG.integers(1, 100, (BANDS, 20, 20))
    codes[0, 7, 3, 4] = 0
    path = write_mosaic(tmp_path / "m", codes=codes, fill=0, time=(np.array([2020]), {}))
    (tile,) = scan_mosaic(settings(path))
    found = read_mosaic(tile.href, tile.grid, Region(0, 0, 70, 90), 2020, AccessSettings())
    codes[:, :, 20:], codes[:, :, :, 20:] = NODATA, NODATA
    np.testing.assert_array_equal(found, codes[0])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "data"}, r"no AlphaEarth mosaic: it has no embeddings, but data, time, x, y"),
        ({"codes": CODES.astype(np.uint8), "fill": 0}, r"holds uint8 instead of int8"),
        ({"codes": CODES[:, :3]}, r"has 3 bands instead of 64"),
        ({"dimensions": ("time", "y", "x", "band")}, r"dimensions \('time', 'y', 'x', 'band'\)"),
        ({"attributes": {}}, r"declares no CRS; it must have one, as proj:code"),
        ({"attributes": {"proj:code": "EPSG:4326", "proj:wkt2": "EPSG:4269"}}, r"the CRSs EPSG"),
        ({"attributes": {"proj:code": "EPSG:0"}}, r"PROJ does not know the CRS 'EPSG:0'"),
        ({"attributes": {"proj:code": "EPSG:4326"}, "coordinates": False}, r"neither coordinates"),
        ({"shift": 0.5}, r"coordinates \(taken as pixel centres\).*one of them is wrong"),
        ({"time": (np.array([0, 1, 2]), {})}, r"names no years.*days since"),
        ({"time": (np.array([0, 1, 2]), {"units": "months since 2019-01-01"})}, r"months since"),
        ({"bands": np.array([f"B{b}" for b in range(64)], "U3")}, r"its bands are \['B0'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_what_no_mosaic_has(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_mosaic(tmp_path / "m.zarr", consolidated=False, **changes)
    with pytest.raises(InputError, match=message) as caught:
        scan_mosaic(settings(path))
    assert "m.zarr" in str(caught.value) or "PROJ" in str(caught.value)


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_bands_by_name(tmp_path: Path) -> None:
    path = write_mosaic(tmp_path / "m", bands=np.array(BAND_NAMES, "U3"), consolidated=False)
    assert scan_mosaic(settings(path))


def test_a_year_that_it_lacks(mosaic: Path) -> None:
    with pytest.raises(InputError, match=r"has no \[2018, 2022\]; it has \[2019, 2020, 2021\]"):
        scan_mosaic(settings(mosaic, [2018, 2020, 2022]))


def test_what_is_no_zarr(tmp_path: Path) -> None:
    missing = tmp_path / "missing.zarr"
    with pytest.raises(InputError, match=r"missing\.zarr is no Zarr group, or is missing"):
        scan_mosaic(settings(missing))
    assert not missing.exists()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder is no Zarr group, or is missing"):
        scan_mosaic(settings(tmp_path / "folder"))
    array = tmp_path / "array.zarr"
    zarr.create_array(array, shape=(2,), dtype="i1")
    with pytest.raises(InputError, match=r"array\.zarr is no Zarr group"):
        scan_mosaic(settings(array))
    group = zarr.open_group(tmp_path / "empty.zarr", mode="w")
    group.attrs["proj:code"] = "EPSG:4326"
    with pytest.raises(InputError, match=r"has no embeddings, but no arrays"):
        scan_mosaic(settings(tmp_path / "empty.zarr"))


def test_uneven_coordinates(tmp_path: Path) -> None:
    path = write_mosaic(tmp_path / "m", attributes={"proj:code": "EPSG:4326"}, consolidated=False)
    group = zarr.open_group(path, mode="r+")
    group["x"][45] = group["x"][45] + STEP
    with pytest.raises(InputError, match=r"its x is uneven"):
        scan_mosaic(settings(path))


def test_a_damaged_shard_may_pass_on_a_rerun(tmp_path: Path) -> None:
    path = write_mosaic(tmp_path / "m")
    (tile,) = scan_mosaic(settings(path))
    shard = path / "embeddings" / "c" / "1" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(OSError, match=r"breaks off while it is read|cannot read"):
        read_mosaic(tile.href, tile.grid, Region(0, 0, 9, 9), 2020, AccessSettings())
    found = read_mosaic(tile.href, tile.grid, Region(40, 40, 9, 9), 2020, AccessSettings())
    np.testing.assert_array_equal(found, CODES[1, :, 40:49, 40:49])


def test_a_mosaic_that_is_not_what_the_plan_saw(mosaic: Path) -> None:
    (tile,) = scan_mosaic(settings(mosaic))
    other = tile.grid.part(Region(0, 0, 70, 89))
    with pytest.raises(OSError, match=r"not what the plan saw.*plan again"):
        read_mosaic(tile.href, other, Region(0, 0, 2, 2), 2020, AccessSettings())
