"""What other programs make of an export: rioxarray, odc-geo, xarray, and GDAL's own tools."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr

from tests.runs import arrays, run_here
from tests.test_calibrate import GRID, Map, make_map
from tests.test_export_area import area, bounds
from tests.test_export_step import files

pytestmark = [  # what odc-geo and rioxarray still ask of affine and shapely
    pytest.mark.filterwarnings("ignore:Use `@` matmul"),
    pytest.mark.filterwarnings("ignore:The 'shapely.ops.transform"),
]
gdal = pytest.mark.skipif(not shutil.which("gdalinfo"), reason="needs GDAL's tools: gdal-bin")
SETTINGS = ("--set", "export.block=128", "--set", "export.pyramids=true")


@pytest.fixture(scope="module")
def done(tmp_path_factory, scheduler) -> Map:
    """An export of one zone and year with all that it can hold; it is only read."""
    folder = tmp_path_factory.mktemp("programs")
    made = make_map(folder, reference=True)
    box = bounds((40, 90), (100, 170))
    for asked in (SETTINGS, area(box)):
        result = run_here("export", made.region.path, *asked, "--scheduler", scheduler)
        assert result.code == 0, result.err
    return made


def cog(made: Map, layer: str = "height") -> Path:
    return made.region.store / f"export/utm10n/2021/{layer}-r0000000-c0000000-150x200.tif"


def plain(made: Map, layer: str = "height") -> Path:
    (path,) = files(made.region, f"area/utm10n/2021/{layer}-*.tif")
    return path


def heights(made: Map) -> np.ndarray:
    values: np.ndarray = arrays(made.region.heights)["height"][0]
    return values


def gdalinfo(path: Path, *options: str) -> dict:
    found = subprocess.run(
        ["gdalinfo", "-json", *options, path], check=True, capture_output=True, text=True
    )
    return json.loads(found.stdout)


# Python libraries.


def test_rioxarray_reads_cogs(done):
    with rioxarray.open_rasterio(cog(done), masked=True) as found:
        np.testing.assert_array_equal(found.to_numpy()[0], heights(done))
        assert found.rio.crs.is_projected
        assert rasterio.CRS.from_wkt(found.rio.crs.to_wkt()).linear_units == "metre"
        assert found.rio.bounds() == pytest.approx(GRID.bounds)
        assert found.attrs["units"] == "metre"
    with rioxarray.open_rasterio(cog(done), overview_level=0) as found:
        assert found.shape == (1, 75, 100)


def test_odc_geo_sees_pixels_of_cogs_and_maps(done):
    import odc.geo.xr  # noqa: F401, PLC0415

    with rioxarray.open_rasterio(cog(done, "spread"), masked=True) as found:
        box = found.odc.geobox
        assert box.shape == GRID.shape
        assert tuple(box.transform)[:6] == pytest.approx(tuple(GRID.transform)[:6])
        assert box.crs.epsg == 32610
        half = found.squeeze(drop=True).odc.reproject(box.zoom_out(2), resampling="nearest")
        assert half.shape == (75, 100)
    with xr.open_zarr(done.region.heights, group="utm10n") as found:
        assert found.odc.geobox == box


def test_a_pyramid_reprojects(done):
    """Its CRS is good for work: odc-geo warps a coarse level into degrees."""
    import odc.geo.xr  # noqa: F401, PLC0415

    path = done.region.store / "export" / "pyramids.zarr"
    with xr.open_zarr(path, group="utm10n/1") as found:
        warped = found["height"].isel(time=0).compute().odc.reproject("EPSG:4326")
        assert warped.odc.crs.epsg == 4326
        assert np.nanmean(warped) == pytest.approx(np.nanmean(found["height"][0]), abs=3)


# GDAL's tools.


@gdal
def test_gdalinfo_sees_all_that_a_cog_says(done):
    found = gdalinfo(cog(done))
    assert found["size"] == [200, 150]
    wkt = found["coordinateSystem"]["wkt"]
    assert wkt.startswith("COMPOUNDCRS[")
    assert re.findall(r'ID\["EPSG",(\d+)\]', wkt)[-2:] == ["32610", "5773"]
    assert 'VERTCRS["EGM96 height"' in wkt
    (band,) = found["bands"]
    assert (band["type"], band["unit"]) == ("Float32", "metre")
    assert band["noDataValue"] == "NaN"
    assert [level["size"] for level in band["overviews"]] == [[100, 75]]
    assert found["metadata"]["IMAGE_STRUCTURE"]["LAYOUT"] == "COG"
    statistics = band["metadata"][""]
    assert float(statistics["STATISTICS_MEAN"]) == pytest.approx(np.nanmean(heights(done)))
    assert float(statistics["STATISTICS_MAXIMUM"]) == np.nanmax(heights(done))
    assert found["metadata"][""]["VERTICAL_DATUM"] == "EPSG:5773"


@gdal
def test_gdals_checksums_are_rasterios(done):
    for path in (cog(done), cog(done, "difference"), plain(done), plain(done, "reference")):
        with rasterio.open(path) as opened:
            assert gdalinfo(path, "-checksum")["bands"][0]["checksum"] == opened.checksum(1)


@gdal
def test_a_plain_file_has_no_overviews(done):
    found = gdalinfo(plain(done))
    assert "overviews" not in found["bands"][0]
    assert "LAYOUT" not in found["metadata"]["IMAGE_STRUCTURE"]
    assert found["metadata"]["IMAGE_STRUCTURE"]["COMPRESSION"] == "DEFLATE"
    assert found["coordinateSystem"]["wkt"].startswith("COMPOUNDCRS[")


@gdal
def test_gdal_translate_cuts_and_gdalwarp_moves(done, tmp_path):
    cut, warped = tmp_path / "cut.tif", tmp_path / "warped.tif"
    window = ["-srcwin", "100", "60", "50", "40"]
    subprocess.run(["gdal_translate", "-q", *window, cog(done), cut], check=True)
    with rasterio.open(cut) as found:
        np.testing.assert_array_equal(found.read(1), heights(done)[60:100, 100:150])
        assert found.units == ("metre",)
    half = ["-tr", "20", "20", "-r", "average"]
    subprocess.run(["gdalwarp", "-q", *half, cog(done), warped], check=True)
    with rasterio.open(warped) as found, rasterio.open(cog(done), overview_level=0) as overview:
        np.testing.assert_allclose(found.read(1), overview.read(1), rtol=1e-5)
        assert np.isnan(found.nodata)


@gdal
@pytest.mark.parametrize("target", [["EPSG:4326+5773"], ["EPSG:4326", "-novshift"]])
def test_gdalwarp_to_degrees_leaves_heights_alone(done, tmp_path, target):
    """GDAL knows the geoid: asked for a CRS without one, it would give ellipsoidal heights."""
    warped = tmp_path / "degrees.tif"
    subprocess.run(
        ["gdalwarp", "-q", "-r", "near", "-t_srs", *target, cog(done), warped], check=True
    )
    with rasterio.open(warped) as found:
        values = found.read(1)
    known = values[np.isfinite(values)]
    assert np.isin(known, heights(done)).all()
    assert len(known) > 0.9 * np.isfinite(heights(done)).sum()
