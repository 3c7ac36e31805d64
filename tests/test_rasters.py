"""Headers of height rasters: what the plan must meet, and the files that make one model."""

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
import rasterio
from pydantic import TypeAdapter
from pyproj import Transformer

from aeheight.errors import InputError
from aeheight.sources.heights import HeightSource, read_heights
from aeheight.windows import whole
from tests.tifs import (
    CRS,
    DATA,
    GRID,
    LEFT,
    TOP,
    block_mean,
    grid_of,
    read,
    source_of,
    terrain,
    write_heights,
)


def mosaic_of(path: Path, parts: list[tuple[Path, int, int]], shape: tuple[int, int]) -> Path:
    """A VRT of 5 m over parts at (row, column)."""
    sources = ""
    for part, row, col in parts:
        with rasterio.open(part) as dataset:
            rows, cols = dataset.shape
        size = f'xSize="{cols}" ySize="{rows}"'
        sources += f"""<ComplexSource><SourceFilename relativeToVRT="1">{escape(part.name)}
            </SourceFilename><SourceBand>1</SourceBand><SourceProperties RasterXSize="{cols}"
            RasterYSize="{rows}" DataType="Float32" BlockXSize="{cols}" BlockYSize="1"/>
            <SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="{col}" yOff="{row}" {size}/>
            <NODATA>-9999</NODATA></ComplexSource>""".replace("\n            ", "")
    path.write_text(
        f"""<VRTDataset rasterXSize="{shape[1]}" rasterYSize="{shape[0]}"><SRS>{CRS}</SRS>
        <GeoTransform>{LEFT},5,0,{TOP},0,-5</GeoTransform><VRTRasterBand dataType="Float32"
        band="1"><NoDataValue>-9999</NoDataValue>{sources}</VRTRasterBand></VRTDataset>"""
    )
    return path


def test_a_vrt_is_its_files(tmp_path: Path) -> None:
    heights = terrain(60, 72, 0.2)
    parts = [
        (write_heights(tmp_path / "a.tif", heights[:, :31], step=5.0), 0, 0),
        (write_heights(tmp_path / "b.tif", heights[:, 31:], LEFT + 155, step=5.0), 0, 31),
    ]
    vrt = mosaic_of(tmp_path / "all.vrt", parts, heights.shape)
    wanted = block_mean(heights, 2)
    np.testing.assert_allclose(read(vrt), wanted, rtol=1e-6)
    planned = source_of(vrt)
    parts[1][0].unlink()
    with pytest.raises(InputError, match=r"all\.vrt: .* 1 are missing, such as .*b\.tif"):
        source_of(vrt)
    with pytest.raises(InputError, match=r"all\.vrt: .*b\.tif"):
        read_heights(planned, GRID, whole(GRID.shape))


def test_hundreds_of_rasters_are_one_surface(tmp_path: Path) -> None:
    heights = terrain(600, 600)
    for row in range(0, 600, 40):
        for col in range(0, 600, 12):
            at = LEFT + 5 * col, TOP - 5 * row
            part = heights[row : row + 40, col : col + 12]
            write_heights(tmp_path / f"{row:03d}_{col:03d}.tif", part, *at, 5.0)
    grid = grid_of(300, 300)
    source = source_of(tmp_path, grid)
    assert len(source.rasters) == 750
    assert [r.href for r in source.rasters] == sorted(r.href for r in source.rasters)
    assert len({raster.lattice for raster in source.rasters}) == 1
    found = read_heights(source, grid, whole(grid.shape))
    np.testing.assert_allclose(found, block_mean(heights, 2), rtol=1e-6)


def test_of_several_bad_files_the_first_is_named(tmp_path: Path) -> None:
    for n in range(40):
        write_heights(tmp_path / f"{n:02d}.tif", terrain(3, 3))
    for n in (11, 29, 30):
        (tmp_path / f"{n:02d}.tif").write_text("text")
    for _ in range(3):
        with pytest.raises(InputError, match=r"11\.tif cannot be opened"):
            source_of(tmp_path)


def test_a_source_survives_json(tmp_path: Path) -> None:
    write_heights(tmp_path / "a.tif", terrain(20, 20), LEFT + 0.1, TOP, 1 / 3)
    write_heights(tmp_path / "b.tif", terrain(20, 20), nodata=None)
    source = source_of(tmp_path)
    kind = TypeAdapter(HeightSource)
    assert kind.validate_json(kind.dump_json(source)) == source
    raster = source.rasters[0]
    assert raster.resolution == (1 / 3, 1 / 3)
    assert raster.bounds == pytest.approx((LEFT + 0.1, TOP - 20 / 3, LEFT + 0.1 + 20 / 3, TOP))


# --- points and areas ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Area", "Point"])
@pytest.mark.parametrize("step", [2.0, 2.5, 30.0])
def test_a_plane_keeps_its_heights_at_pixel_centres(tmp_path: Path, kind: str, step: float) -> None:
    """Half a source pixel of shift would be 0.3 m or more; GDAL has moved a point's corner."""
    edge = int(600 / step)
    rows, cols = np.mgrid[:edge, :edge] + 0.5
    left, top = LEFT - 90, TOP + 90

    def plane(x: Any, y: Any) -> Any:
        return 200 + 0.3 * (x - LEFT) - 0.2 * (y - TOP)

    values = plane(left + cols * step, top - rows * step).astype(np.float32)
    path = write_heights(tmp_path / "plane.tif", values, left, top, step)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(AREA_OR_POINT=kind)
    grid = grid_of(20, 20)
    wanted = plane(*np.meshgrid(grid.x(), grid.y()))
    np.testing.assert_allclose(read(path, grid), wanted, atol=1e-4)
    vrt = tmp_path / "plane.vrt"
    vrt.write_text(
        f"""<VRTDataset rasterXSize="{edge}" rasterYSize="{edge}"><SRS>{CRS}</SRS><GeoTransform>
        {left},{step},0,{top},0,{-step}</GeoTransform><Metadata><MDI key="AREA_OR_POINT">{kind}
        </MDI></Metadata><VRTRasterBand dataType="Float32" band="1"><SimpleSource>
        <SourceFilename relativeToVRT="1">plane.tif</SourceFilename><SourceBand>1</SourceBand>
        </SimpleSource></VRTRasterBand></VRTDataset>"""
    )
    np.testing.assert_array_equal(read(vrt, grid), read(path, grid))


# --- missing-values -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2.0, 10.0, 30.0])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("missing", [-9999, -32768, 0])
def test_nodata_of_any_kind_takes_no_part(
    tmp_path: Path, step: float, dtype: str, missing: int
) -> None:
    """Declared by the file or by the setting, and NaN beside it: the same heights."""
    edge = round(420 / step)
    heights = np.round(terrain(edge, edge, 0.2))
    voids = np.where(np.isnan(heights), missing, heights).astype(dtype)
    corner = LEFT - 30, TOP + 30, step
    if dtype != "int16":
        voids[edge // 2, edge // 3] = np.nan
        heights[edge // 2, edge // 3] = np.nan
    plain = write_heights(tmp_path / "nan.tif", heights, *corner, None)
    declared = write_heights(tmp_path / "declared.tif", voids, *corner, None)
    with rasterio.open(declared, "r+") as dataset:
        dataset.nodata = missing
    told = write_heights(tmp_path / "told.tif", voids, *corner, None)
    wanted = read(plain)
    np.testing.assert_array_equal(read(declared), wanted)
    np.testing.assert_array_equal(read(told, nodata=missing), wanted)


@pytest.mark.parametrize("declared", [None, -9999.0])
@pytest.mark.parametrize("tag", ["STATISTICS_MINIMUM", "STATISTICS_MAXIMUM"])
def test_statistics_of_a_header_betray_a_missing_value(
    tmp_path: Path, declared: float | None, tag: str
) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36), nodata=declared)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(1, **{tag: "-32768"})
    remedy = "name it in `nodata`" if declared is None else "declared is -9999"
    with pytest.raises(InputError, match=rf"height: .*dsm\.tif: .*-32768 m.*{remedy}"):
        source_of(path)
    if declared is None:
        assert source_of(path, nodata=-32768).rasters[0].nodata == -32768


def test_the_wrong_nodata_is_met_while_reading(tmp_path: Path) -> None:
    heights = np.full((30, 36), 100, np.int16)
    heights[3, 4] = -32768
    path = write_heights(tmp_path / "dsm.tif", heights, nodata=-9999)
    with pytest.raises(InputError, match=r"dsm\.tif: .*-32768 m .*declared is -9999"):
        read(path)
    path = write_heights(tmp_path / "none.tif", heights, nodata=None)
    with pytest.raises(InputError, match=r"none\.tif: .*-32768 m .*name it in `nodata`"):
        read(path)


def test_ground_at_sea_level_without_nodata_is_ground(tmp_path: Path) -> None:
    heights = np.zeros((60, 72), np.float32)
    path = write_heights(tmp_path / "polder.tif", heights, step=5.0, nodata=None)
    np.testing.assert_array_equal(read(path), np.zeros(GRID.shape))


# --- units and datums ---------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["ft", "foot", "US survey foot", "cm"])
def test_heights_that_are_no_metres(tmp_path: Path, unit: str) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    with rasterio.open(path, "r+") as dataset:
        dataset.units = (unit,)
    with pytest.raises(InputError, match=rf"height: .*dsm\.tif: its heights are in '{unit}'.*calc"):
        source_of(path)
    with rasterio.open(path, "r+") as dataset:
        dataset.units = ("metre",)
    assert source_of(path).rasters


@pytest.mark.parametrize(
    ("crs", "message"),
    [
        (f"{CRS}+3855", r"datum as EPSG:3855 \(EGM2008 height\), .* says EPSG:5773 \(EGM96 height"),
        (f"{CRS}+6360", r"US survey foot \(NAVD88 height \(ftUS\)\).*0\.3048006"),
        (f"{CRS}+5773", None),
    ],
    ids=["other", "feet", "the same"],
)
def test_a_file_that_names_its_vertical_datum(
    tmp_path: Path, crs: str, message: str | None
) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36), crs=crs)
    if message is None:
        assert source_of(path).rasters[0].crs == CRS
        return
    with pytest.raises(InputError, match=rf"height: .*dsm\.tif: .*{message}"):
        source_of(path)


def test_a_file_that_changed_since_the_plan(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    source = source_of(path)
    write_heights(path, terrain(30, 36), LEFT + 10)
    with pytest.raises(InputError, match=r"dsm\.tif: .*was described as"):
        read_heights(source, GRID, whole(GRID.shape))


@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside the project")
def test_a_real_surface_in_pieces_is_the_surface(tmp_path: Path) -> None:
    path = DATA / "dsm" / "dc_lidar_2m" / "dsm.tif"
    with rasterio.open(path) as dataset:
        heights, transform, missing = dataset.read(1), dataset.transform, dataset.nodata
        crs = dataset.crs.to_string()
    for n, col in enumerate(range(0, heights.shape[1], 101)):
        part = heights[:, col : col + 101]
        at = transform.c + col * transform.a
        write_heights(tmp_path / f"{n}.tif", part, at, transform.f, transform.a, missing, crs)
    x, y = Transformer.from_crs(crs, "EPSG:32618", always_xy=True).transform(
        transform.c, transform.f
    )
    for one in (
        grid_of(50, 55),
        grid_of(60, 60),
    ):
        place = (crs, transform.c, transform.f) if one.shape == (50, 55) else ("EPSG:32618", x, y)
        grid = type(one)(place[0], 10.0, round(place[1]), round(place[2]), one.shape)
        np.testing.assert_array_equal(read(tmp_path, grid), read(path, grid))
