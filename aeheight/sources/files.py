"""Hrefs to files: one, a list, a glob, a folder or a URI."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rasterio
from rasterio.errors import RasterioIOError

from aeheight.errors import InputError
from aeheight.settings import RegionSettings
from aeheight.store import Store

_RASTERS = (".tif", ".tiff", ".vrt", ".img", ".asc", ".hgt")


def find_files(settings: RegionSettings, hrefs: str | list[str], key: str) -> list[str]:
    """Every raster that the hrefs name, sorted within each href.

    Args:
        settings: resolves relative hrefs.
        hrefs: as written in the region file.
        key: the setting, for messages.

    Raises:
        InputError: an href that names nothing.
    """
    found: list[str] = []
    for href in [hrefs] if isinstance(hrefs, str) else hrefs:
        matches = _matches(settings.resolve(href))
        if not matches:
            raise InputError(
                f"{key}.href: {href!r} names no raster ({settings.resolve(href)} is missing, or "
                f"holds no {', '.join(_RASTERS)}); relative hrefs start at the region file"
            )
        found += [match for match in matches if match not in found]
    return found


def _matches(href: str) -> list[str]:
    if "://" in href:
        if not href.endswith("/"):
            return [href]
        keys = Store.at(href).keys()
        return _without_doubles([href + key for key in keys if key.lower().endswith(_RASTERS)])
    path = Path(href)
    if path.is_dir():
        return _without_doubles([str(p) for p in path.rglob("*") if p.suffix.lower() in _RASTERS])
    if path.exists():
        return [href]
    return sorted(glob.glob(href, recursive=True))  # noqa: PTH207 (an absolute pattern)


def _without_doubles(hrefs: list[str]) -> list[str]:
    """Sorted, without a .vrt that only turns the raster of the same name beside it."""
    rasters = {href.rpartition(".")[0] for href in hrefs if not href.lower().endswith(".vrt")}
    return sorted(
        href
        for href in hrefs
        if not href.lower().endswith(".vrt") or href.rpartition(".")[0] not in rasters
    )


@contextmanager
def opened(href: str) -> Iterator[Any]:
    """An open rasterio dataset.

    Raises:
        InputError: GDAL cannot open it.
        OSError: it breaks off while it is read.
    """
    try:
        dataset = rasterio.open(href)
    except RasterioIOError as error:
        raise InputError(f"{href} cannot be opened as a raster: {error}") from error
    with dataset:
        try:
            yield dataset
        except RasterioIOError as error:
            cause = error.__cause__ or error
            raise OSError(f"{href} breaks off while it is read: {cause}") from error


def geometry_problem(dataset: Any) -> str | None:
    """Why a raster's pixels are not square and aligned to its CRS, or None."""
    transform = dataset.transform
    if dataset.crs is None:
        return "it has no CRS; assign one, for example with gdal_edit.py -a_srs EPSG:..."
    if transform.b or transform.d:
        return f"its pixels are rotated ({tuple(transform)[:6]}); warp it north-up first"
    return None
