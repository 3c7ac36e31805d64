"""Earth Engine's exports: the codes come back bit for bit however the export was cut up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from aeheight.embeddings import BAND_NAMES, BANDS, NODATA
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import RegionSettings
from aeheight.sources.exports import scan_exports
from aeheight.sources.tile import EmbeddingSource, EmbeddingTile
from aeheight.sources.tiles import read_embeddings
from aeheight.windows import Region, whole
from tests.tifs import DATA, random_codes, region

RNG = np.random.default_rng(23)
UTM = Grid("EPSG:32616", 10.0, 358400.0, 4906610.0, (16, 17))
DEGREES = Grid("EPSG:4326", 8.983152841195215e-05, -88.77, 44.30, (16, 17))
CODES = np.stack([np.roll(np.resize(np.arange(-127, 128), 16 * 17), 7 * b) for b in range(BANDS)])
CODES = CODES.reshape(BANDS, 16, 17).astype(np.int8)
"""Every code in every band."""
CODES[:, 3, 4] = CODES[:, 9, :5] = NODATA
REAL = DATA / "wisconsin_10m" / "aef_wi_1km_2024_utm16n_int8_exact.tif"


def exact(codes: np.ndarray, missing: float = np.nan) -> np.ndarray:
    """What Earth Engine writes: sign(q) (|q| / 127.5)^2 in float64."""
    values = np.sign(codes) * (np.abs(codes.astype(np.float64)) / 127.5) ** 2
    return np.where(codes == NODATA, missing, values)


def export(
    path: Path,
    values: np.ndarray,
    grid: Grid = UTM,
    bands: Sequence[str | None] | None = BAND_NAMES,
    nodata: float | None = None,
) -> Path:
    """A GeoTIFF as Earth Engine writes it: pixel-interleaved, in blocks, bands by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype,
        crs=grid.crs, transform=grid.transform, nodata=nodata, compress="lzw",
        tiled=True, blockxsize=16, blockysize=16,
    ) as target:  # fmt: skip
        target.write(values)
        for number, name in enumerate(bands or [], 1):
            target.set_band_description(number, name or "")
    return path


def settings(hrefs: Any, year: Any = 2024) -> RegionSettings:
    href = [str(one) for one in hrefs] if isinstance(hrefs, list) else str(hrefs)
    return region("unused.tif", embeddings={"source": "earthengine", "href": href, "year": year})


def read(tiles: list[EmbeddingTile], grid: Grid, year: int = 2024) -> np.ndarray:
    return read_embeddings(EmbeddingSource(tuple(tiles)), grid, whole(grid.shape), year)


@pytest.mark.parametrize("grid", [UTM, DEGREES], ids=["utm", "degrees"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int8"])
@pytest.mark.parametrize("missing", [np.nan, -9999.0])
@pytest.mark.parametrize("parts", [1, 2, 64])
def test_codes_come_back_bit_for_bit(
    tmp_path: Path, grid: Grid, dtype: str, missing: float, parts: int
) -> None:
    """One file, two halves, and a file a band named by it; in reverse order of their bands."""
    values = CODES if dtype == "int8" else exact(CODES, missing).astype(dtype)
    declared = NODATA if dtype == "int8" else None if np.isnan(missing) else missing
    size = BANDS // parts
    for first in range(0, BANDS, size):
        names = None if parts == 64 else BAND_NAMES[first : first + size]
        name = f"ee_A{first:02d}.tif" if parts == 64 else f"{99 - first}.tif"
        export(tmp_path / name, values[first : first + size], grid, names, declared)
    tiles = scan_exports(settings(tmp_path))
    assert [(len(t.files), t.grid, t.year, t.kind, t.block) for t in tiles] == [
        (parts, grid, 2024, "raster", 16)
    ]
    np.testing.assert_array_equal(read(tiles, grid), CODES)
    part = Region(5, 3, 7, 9)
    found = read_embeddings(EmbeddingSource(tuple(tiles)), grid, part, 2024)
    np.testing.assert_array_equal(found, CODES[(slice(None), *part.slices)])


@pytest.mark.skipif(not REAL.exists(), reason="the real tile is not beside the project")
@pytest.mark.parametrize("parts", [1, 2, 64])
def test_a_real_tile_comes_back_bit_for_bit(tmp_path: Path, parts: int) -> None:
    with rasterio.open(REAL) as dataset:
        codes, transform = dataset.read(), dataset.transform
    grid = Grid("EPSG:32616", 10.0, transform.c, transform.f, codes.shape[1:])
    size = BANDS // parts
    for first in range(0, BANDS, size):
        values = exact(codes[first : first + size])
        export(tmp_path / f"wi.A{first:02d}.tif", values, grid, BAND_NAMES[first : first + size])
    np.testing.assert_array_equal(read(scan_exports(settings(tmp_path)), grid), codes)


def test_names_of_bands(tmp_path: Path) -> None:
    """As `toBands` writes them, in any order; no names at all are A00 to A63."""
    order = RNG.permutation(BANDS)
    names = [f"2024_{BAND_NAMES[band]}" for band in order]
    tiles = scan_exports(settings(export(tmp_path / "a.tif", exact(CODES)[order], bands=names)))
    assert tiles[0].files[0].bands == tuple(order)
    np.testing.assert_array_equal(read(tiles, UTM), CODES)
    tiles = scan_exports(settings(export(tmp_path / "b.tif", exact(CODES), bands=None)))
    assert tiles[0].files[0].bands == ()
    np.testing.assert_array_equal(read(tiles, UTM), CODES)


@pytest.mark.parametrize("by_bands", [False, True])
def test_pieces_lie_side_by_side(tmp_path: Path, by_bands: bool) -> None:
    """Earth Engine cuts a large export: `name-0000000000-0000000016.tif`."""
    codes = random_codes(RNG, 32, 40)
    grid = Grid("EPSG:32616", 10.0, 358400.0, 4906610.0, (32, 40))
    for part in (Region(0, 0, 16, 16), Region(0, 16, 16, 24), Region(16, 0, 16, 16)):
        values, place = exact(codes[(slice(None), *part.slices)]), grid.part(part)
        end = f"-{part.row:010d}-{part.col:010d}.tif"
        for name in BAND_NAMES if by_bands else []:
            band = values[int(name[1:])][None]
            export(tmp_path / f"ee_{name}{end}", band, place, bands=None)
        if not by_bands:
            export(tmp_path / f"ee{end}", values, place)
    tiles = scan_exports(settings(tmp_path))
    assert len(tiles) == 3
    assert {len(tile.files) for tile in tiles} == {64 if by_bands else 1}
    codes[:, 16:, 16:] = NODATA
    np.testing.assert_array_equal(read(tiles, grid), codes)


def test_a_pixel_that_lacks_one_band_lacks_all(tmp_path: Path) -> None:
    values = exact(CODES)
    values[40, 1, 2] = np.nan
    export(tmp_path / "a.tif", values[:32], bands=BAND_NAMES[:32])
    export(tmp_path / "b.tif", values[32:], bands=BAND_NAMES[32:])
    found = read(scan_exports(settings(tmp_path)), UTM)
    assert (found[:, 1, 2] == NODATA).all()
    found[:, 1, 2] = CODES[:, 1, 2]
    np.testing.assert_array_equal(found, CODES)


def test_years(tmp_path: Path) -> None:
    other = random_codes(RNG, 16, 17)
    export(tmp_path / "2023" / "16N" / "a.tif", exact(other))
    export(tmp_path / "2024" / "16N" / "a.tif", exact(CODES))
    tiles = scan_exports(settings(tmp_path, [2023, 2024]))
    np.testing.assert_array_equal(read(tiles, UTM, 2023), other)
    np.testing.assert_array_equal(read(tiles, UTM, 2024), CODES)
    assert [tile.year for tile in scan_exports(settings(tmp_path, 2024))] == [2024]
    with pytest.raises(InputError, match=r"no export of \[2020\].*there are \[2023, 2024\]"):
        scan_exports(settings(tmp_path, [2020, 2023]))
    stray = export(tmp_path / "stray.tif", exact(CODES))
    with pytest.raises(InputError, match=r"stray\.tif: its path names no year.*YEAR/ZONE"):
        scan_exports(settings(stray, [2023, 2024]))


# --- bad input ----------------------------------------------------------------------------------


def test_bands_that_are_missing_or_doubled(tmp_path: Path) -> None:
    values = exact(CODES)
    export(tmp_path / "a.tif", values[:32], bands=BAND_NAMES[:32])
    export(tmp_path / "b.tif", values[33:], bands=BAND_NAMES[33:])
    with pytest.raises(InputError, match=r"no file holds the band A32 of .*2024.*a\.tif.*b\.tif"):
        scan_exports(settings(tmp_path))
    export(tmp_path / "b.tif", values[30:], bands=BAND_NAMES[30:])
    with pytest.raises(InputError, match=r"a\.tif and .*b\.tif both hold the bands A30, A31 of"):
        scan_exports(settings(tmp_path))


def test_two_exports_of_the_same_ground(tmp_path: Path) -> None:
    for name in ("a2023.tif", "b2024.tif"):
        export(tmp_path / name, exact(CODES))
    with pytest.raises(InputError, match=r"both hold the bands A00.*\(64 bands\).*YEAR/ZONE"):
        scan_exports(settings(tmp_path))


def test_a_band_on_another_grid_is_missing(tmp_path: Path) -> None:
    values = exact(CODES)
    export(tmp_path / "a.tif", values[:63], bands=BAND_NAMES[:63])
    moved = Grid(UTM.crs, 10.0, UTM.left + 10, UTM.top, UTM.shape)
    export(tmp_path / "b.tif", values[63:], moved, bands=BAND_NAMES[63:])
    with pytest.raises(InputError, match=r"no file holds the band A63 of \[358400"):
        scan_exports(settings(tmp_path))


@pytest.mark.parametrize(
    ("count", "bands", "name", "message"),
    [
        (3, None, "rgb.tif", r"rgb\.tif: which of the bands A00 to A63 are its 3\?.*'rgb'"),
        (2, ("A00", "B1"), "x.tif", r"called 'B1'"),
        (1, ("A64",), "x.tif", r"called 'A64'"),
        (64, ("x",) * 64, "x.tif", r"called 'x'"),
        (3, None, "x_A07.tif", r"holds 3 bands without names.*A07"),
        (2, ("A00", "A00"), "x.tif", r"holds 2 bands.*A00"),
    ],
)
def test_bands_without_their_names(
    tmp_path: Path, count: int, bands: Any, name: str, message: str
) -> None:
    path = export(tmp_path / name, exact(CODES)[:count], bands=bands)
    with pytest.raises(InputError, match=message):
        scan_exports(settings(path))


def test_headers_that_no_export_has(tmp_path: Path) -> None:
    path = export(tmp_path / "a.tif", CODES.astype(np.int16))
    with pytest.raises(InputError, match=r"a\.tif is no AlphaEarth tile: values are int16"):
        scan_exports(settings(path))
    with rasterio.open(path, "r+") as dataset:
        dataset.transform = Affine(10, 0, 0, 0, -20, 0)
    export(tmp_path / "b.tif", exact(CODES))
    with rasterio.open(tmp_path / "b.tif", "r+") as dataset:
        dataset.transform = Affine(10, 0, 0, 0, -20, 0)
    with pytest.raises(InputError, match=r"b\.tif is no AlphaEarth tile: pixels are 10\.0 x 20\.0"):
        scan_exports(settings(tmp_path / "b.tif"))


def test_values_that_are_no_embedding(tmp_path: Path) -> None:
    values = exact(CODES)
    values[5, 2, 2] = 11.5
    tiles = scan_exports(settings(export(tmp_path / "a.tif", values)))
    with pytest.raises(InputError, match=r"a\.tif: values like 11\.5 lie outside -1 to 1"):
        read(tiles, UTM)
