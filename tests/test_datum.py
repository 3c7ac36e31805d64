"""Vertical datums: named, checked, and converted by grids that are made here."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from pydantic import TypeAdapter
from pyproj import Transformer

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.sources import datum
from aeheight.sources.datum import DatumShift, check_datum, plan_shift, shifted
from aeheight.sources.heights import read_heights
from aeheight.windows import Region, whole
from tests.tifs import CRS, LEFT, TOP, grid_of, source_of, terrain, write_heights

EGM96, EGM2008, ELLIPSOID = "EPSG:5773", "EPSG:3855", "EPSG:4979"
AREA = (-124.5, 38.0, -123.5, 39.0)


def separation(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """EGM96 above the ellipsoid: a plane, which a bilinear grid holds exactly."""
    return -30 + 0.5 * (lon + 124) + 0.25 * (lat - 38)


def write_geoid(folder: Path, name: str, add: float = 0.0, bounds: tuple = (-126, 36, -120, 41)):
    """A geoid as PROJ has them: pixel-is-point, every quarter of a degree."""
    west, south, east, north = bounds
    step = 0.25
    lon, lat = np.arange(west, east + step, step), np.arange(north, south - step, -step)
    values = (separation(*np.meshgrid(lon, lat)) + add).astype(np.float32)
    folder.mkdir(exist_ok=True)
    with rasterio.open(
        folder / name, "w", driver="GTiff", count=1, height=len(lat), width=len(lon),
        dtype="float32", crs="EPSG:4326",
        transform=Affine(step, 0, west - step / 2, 0, -step, north + step / 2),
    ) as target:  # fmt: skip
        target.write(values, 1)
        target.update_tags(AREA_OR_POINT="Point", TYPE="VERTICAL_OFFSET_GEOGRAPHIC_TO_VERTICAL")
        target.set_band_description(1, "geoid_undulation")
        target.units = ("metre",)


@pytest.fixture(autouse=True)
def search_path(tmp_path: Path) -> Iterator[Path]:
    """A folder where PROJ looks for grids; forgotten afterwards."""
    before = pyproj.datadir.get_data_dir()
    folder = tmp_path / "proj"
    folder.mkdir()
    pyproj.datadir.append_data_dir(folder)
    datum._proven.cache_clear()
    yield folder
    pyproj.datadir.set_data_dir(before)
    datum._proven.cache_clear()


@pytest.fixture
def geoids(search_path: Path) -> Path:
    write_geoid(search_path, "us_nga_egm96_15.tif")
    write_geoid(search_path, "us_nga_egm08_25.tif", 1.5)
    return search_path


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [EGM96, EGM2008, ELLIPSOID, "EPSG:5703", "EPSG:5621", "EPSG:9518"])
def test_a_datum_that_proj_knows(text: str) -> None:
    check_datum(text, "height.vertical_datum")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EGM96", r"does not know 'EGM96'; for example EPSG:5773 \(EGM96\)"),
        ("egm 2008", r"EPSG:3855 \(EGM2008\)"),
        ("NAVD88", r"EPSG:5703 \(NAVD88\)"),
        ("EVRF2007", r"EPSG:5621 \(EVRF2007\)"),
        ("wgs84 Ellipsoid", r"EPSG:4979 \(WGS84 ellipsoid\)"),
        ("EPSG:99999", r"does not know 'EPSG:99999'; for example"),
        ("", "does not know ''"),
        ("EPSG:4326", "says nothing of heights"),
        (CRS, "says nothing of heights"),
        ("EPSG:6360", "counts US survey foot up; heights here are metres"),
        ("EPSG:5715", "counts metre down"),
    ],
)
def test_a_datum_that_is_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^prior\.vertical_datum: .*{message}"):
        check_datum(text, "prior.vertical_datum")


# --- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [(EGM96, EGM96), ("EPSG:9707", EGM96)])
def test_equal_datums_need_no_shift(one: str, other: str) -> None:
    assert plan_shift(one, other, AREA) is None


def test_a_missing_grid_is_named_with_its_remedies() -> None:
    with pytest.raises(InputError, match=r"us_nga_egm96_15\.tif") as caught:
        plan_shift(EGM96, ELLIPSOID, AREA)
    for remedy in ("pyproj sync --file us_nga_egm96_15.tif", "PROJ_NETWORK=ON", "PROJ_DATA",
                   "prior.convert: false"):  # fmt: skip
        assert remedy in str(caught.value)


def test_only_the_grids_that_are_missing_are_named(search_path: Path) -> None:
    write_geoid(search_path, "us_nga_egm96_15.tif")
    with pytest.raises(InputError, match=r"needs us_nga_egm08_25\.tif: install"):
        plan_shift(EGM96, EGM2008, AREA)


def test_datums_between_which_no_way_is_known() -> None:
    with pytest.raises(InputError, match=r"PROJ knows no way in .*convert: false"):
        plan_shift("EPSG:5621", EGM2008, (8.0, 47.0, 9.0, 48.0))


@pytest.mark.usefixtures("geoids")
def test_a_grid_that_does_not_cover_the_area() -> None:
    with pytest.raises(InputError, match="do not cover"):
        plan_shift(EGM96, ELLIPSOID, (-121.0, 38.0, -119.0, 39.0))


@pytest.mark.usefixtures("geoids")
def test_what_is_done_is_recorded() -> None:
    shift = plan_shift(EGM96, EGM2008, AREA)
    assert shift is not None
    assert shift.grids == ("us_nga_egm08_25.tif", "us_nga_egm96_15.tif")
    assert "EGM96" in shift.operation
    assert shift.accuracy == pytest.approx(2.0)
    assert {probe[2] for probe in shift.probes} == {-1.5}
    kind = TypeAdapter(DatumShift)
    assert kind.validate_json(kind.dump_json(shift)) == shift
    assert hash(shift) == hash(replace(shift))


# --- values -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("geoids")
@pytest.mark.parametrize("crs", [CRS, "EPSG:4326"])
def test_heights_are_shifted_by_the_known_surface(crs: str) -> None:
    grid = grid_of(300, 200)
    if crs != CRS:
        grid = Grid(crs, 1e-4, -124.1, 38.6, (300, 200))
    heights = terrain(*grid.shape, holes=0.2)
    x, y = np.meshgrid(grid.x(), grid.y())
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    for source, target, added in (
        (EGM96, ELLIPSOID, separation(lon, lat)),
        (ELLIPSOID, EGM96, -separation(lon, lat)),
        (EGM96, EGM2008, np.full(grid.shape, -1.5)),
    ):
        shift = plan_shift(source, target, AREA)
        assert shift is not None
        found = shifted(shift, heights, grid, whole(grid.shape))
        np.testing.assert_allclose(found, heights + added, atol=1e-3)
        for part in (Region(3, 5, 1, 1), Region(100, 50, 77, 31)):
            again = shifted(shift, heights[part.slices], grid, part)
            np.testing.assert_array_equal(again, found[part.slices])


@pytest.mark.usefixtures("geoids")
def test_a_prior_is_read_in_the_other_datum(tmp_path: Path) -> None:
    grid = grid_of(40, 50)
    path = write_heights(
        tmp_path / "p.tif", np.full((40, 40), 100, np.float32), LEFT - 90, TOP + 90, 30.0
    )
    source = source_of(path, grid)
    assert source.shift is None
    shift = plan_shift(EGM96, ELLIPSOID, AREA)
    found = read_heights(replace(source, shift=shift), grid, whole(grid.shape))
    lon, lat = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True).transform(
        *np.meshgrid(grid.x(), grid.y())
    )
    np.testing.assert_allclose(found, 100 + separation(lon, lat), atol=1e-3)


@pytest.mark.parametrize("fault", ["gone", "other values"])
def test_a_worker_with_other_grids_fails(geoids: Path, fault: str) -> None:
    grid, heights = grid_of(9, 9), terrain(9, 9)
    shift = plan_shift(EGM96, ELLIPSOID, AREA)
    assert shift is not None
    shifted(shift, heights, grid, whole(grid.shape))
    datum._proven.cache_clear()  # another process
    if fault == "gone":
        (geoids / "us_nga_egm96_15.tif").unlink()
    else:
        write_geoid(geoids, "us_nga_egm96_15.tif", add=0.02)
    with pytest.raises(InputError, match=r"does not convert EPSG:5773 to EPSG:4979.*egm96_15"):
        shifted(shift, heights, grid, whole(grid.shape))


@pytest.mark.usefixtures("geoids")
def test_heights_past_the_grid_are_an_error_and_voids_are_not() -> None:
    shift = plan_shift(EGM96, ELLIPSOID, AREA)
    assert shift is not None
    grid = Grid("EPSG:4326", 0.1, -120.3, 38.0, (10, 10))
    heights = np.full(grid.shape, np.nan, np.float32)
    assert np.isnan(shifted(shift, heights, grid, whole(grid.shape))).all()
    heights[:, 0] = 5
    assert np.isfinite(shifted(shift, heights, grid, whole(grid.shape))[:, 0]).all()
    heights[5, 9] = 5
    with pytest.raises(InputError, match=r"do not cover -119\.35"):
        shifted(shift, heights, grid, whole(grid.shape))
