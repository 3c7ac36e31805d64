"""Hrefs to files: one, a list, a glob, a folder or a URI; and rasters that GDAL reads from them."""

import glob
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import rasterio
from rasterio._env import set_gdal_config
from rasterio.errors import RasterioIOError
from rasterio.session import DummySession

from aeheight.errors import InputError
from aeheight.settings import AccessSettings, RegionSettings
from aeheight.store import Store, paying_project, s3_endpoint

T = TypeVar("T")

_USUAL = AccessSettings()
_RASTERS = (".tif", ".tiff", ".vrt", ".img", ".asc", ".hgt")
_VSI = {
    "s3": "/vsis3/", "s3a": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/",
    "http": "/vsicurl/http://", "https": "/vsicurl/https://",
}  # fmt: skip
_REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # What failed or was absent once may be there at the next try of a process that lives long.
    "CPL_VSIL_CURL_NON_CACHED": "/vsis3/:/vsigs/:/vsiaz/:/vsicurl/",
    "GDAL_HTTP_MAX_RETRY": "9",
    "GDAL_HTTP_RETRY_DELAY": "0.2",
    "GDAL_HTTP_CONNECTTIMEOUT": "5",
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
    # The block offsets of a tile of 64 bands in one request.
    "GDAL_INGESTED_BYTES_AT_OPEN": "131072",
}
"""GDAL's options for what is read over a network; the environment's own come before them."""
_CACHE = 48 << 20
"""Bytes of decoded blocks that GDAL keeps: one of 256 px with 64 bands of float64 takes 34 MB."""
_SAFE = {"GDAL_NUM_THREADS": "1"}
"""With threads, GDAL 3.10 asks for many blocks at once, and takes one that fails for zeros."""
_PAUSES = (0.2, 0.6, 2.0, 5.0, 5.0)
"""Seconds before a raster that broke off is read again."""
_MEND = 3
"""Of these, how many for a raster that is there but cannot be opened: it may be no raster."""
_answered: set[str] = set()
"""Buckets and hosts that were reached before, and so are worth a longer wait."""


def find_files(
    settings: RegionSettings,
    hrefs: str | list[str],
    key: str,
    access: AccessSettings = _USUAL,
) -> list[str]:
    """Every raster that the hrefs name, sorted within each href.

    Args:
        settings: resolves relative hrefs.
        hrefs: as written in the region file: files, folders and globs (`**` for any depth), on a
            disk or in a bucket; what begins with http is one file.
        key: the setting, for messages.
        access: how the buckets let readers in.

    Raises:
        InputError: an href that names nothing, or a bucket that may not be listed.
        OSError: a bucket cannot be reached.
    """
    found: list[str] = []
    for href in [hrefs] if isinstance(hrefs, str) else hrefs:
        matches = _matches(settings.resolve(href), access)
        if not matches:
            raise InputError(
                f"{key}.href: {href!r} names no raster ({settings.resolve(href)} is missing, or "
                f"holds no {', '.join(_RASTERS)}); relative hrefs start at the region file"
            )
        found += [match for match in matches if match not in found]
    return found


def _matches(href: str, access: AccessSettings) -> list[str]:
    if href.startswith(("http://", "https://")):
        return [href]
    if "://" in href:
        return _in_bucket(href, access)
    path = Path(href)
    if path.is_dir():
        return _without_doubles([str(p) for p in path.rglob("*") if p.suffix.lower() in _RASTERS])
    if path.exists():
        return [href]
    return _without_doubles(glob.glob(href, recursive=True))  # noqa: PTH207 (an absolute pattern)


def _in_bucket(href: str, access: AccessSettings) -> list[str]:
    """What a URI names: one object, all rasters of a folder, or what a glob matches."""
    folder, wild, _ = re.split(r"([*?[]|$)", href, maxsplit=1)
    if not wild and "." in href.rpartition("/")[2]:
        return [href]
    folder = folder.rpartition("/")[0] if wild else href.rstrip("/")
    names = [f"{folder}/{name}" for name in Store.at(folder, access).keys()]  # noqa: SIM118
    if not wild:
        return _without_doubles([name for name in names if name.lower().endswith(_RASTERS)])
    return _without_doubles(list(filter(_glob(href).fullmatch, names)))


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob's regular expression: `*` and `?` stay within a folder, `**/` is any depth."""
    meaning = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    return re.compile(
        "".join(
            meaning.get(part) or (part.replace("[!", "[^") if part[:1] == "[" else re.escape(part))
            for part in parts
        )
    )


def _without_doubles(hrefs: Sequence[str]) -> list[str]:
    """Sorted, without a .vrt that only turns the raster of the same name beside it."""
    rasters = {href.rpartition(".")[0] for href in hrefs if not href.lower().endswith(".vrt")}
    return sorted(
        href
        for href in hrefs
        if not href.lower().endswith(".vrt") or href.rpartition(".")[0] not in rasters
    )


def read_raster(href: str, read: Callable[[Any], T], access: AccessSettings = _USUAL) -> T:
    """What a function makes of an open rasterio dataset; again, where a remote one breaks off.

    A dataset whose read has failed stays broken, so each try opens it anew.

    Raises:
        InputError: see `opened`.
        OSError: it breaks off every time.
    """
    for pause in _PAUSES if "://" in href else ():
        try:
            with opened(href, access) as dataset:
                return read(dataset)
        except OSError as error:
            # A store that is away is waited for here; GDAL gives up much sooner.
            if problem := _why_closed(href, access, error):
                raise problem from error
            time.sleep(pause)
    with opened(href, access) as dataset:
        return read(dataset)


@contextmanager
def opened(href: str, access: AccessSettings = _USUAL) -> Iterator[Any]:
    """An open rasterio dataset, of a path or a URI.

    One set of variables serves here and in `Store`: AWS_ENDPOINT_URL is told to GDAL in its own
    words, unless the environment holds those (AWS_S3_ENDPOINT, AWS_HTTPS, AWS_VIRTUAL_HOSTING).

    Raises:
        InputError: it is missing, no raster, or may not be read.
        OSError: it cannot be reached, or breaks off while it is read.
    """
    _bound_cache()
    configured = rasterio.Env(session=DummySession(), **gdal_options(href, access))
    with configured, _opening(href, access) as dataset:
        try:
            yield dataset
        except RasterioIOError as error:
            cause = error.__cause__ or error
            raise OSError(f"{href} breaks off while it is read: {cause}") from error


@cache
def _bound_cache() -> None:
    """Once a process: GDAL would keep 5 % of the machine's memory in blocks that are used once."""
    if "GDAL_CACHEMAX" not in os.environ:
        set_gdal_config("GDAL_CACHEMAX", _CACHE)


def _opening(href: str, access: AccessSettings) -> Any:
    for pause in (*_PAUSES[:_MEND], None):
        try:
            dataset = rasterio.open(_gdal_name(href))
        except RasterioIOError as error:
            problem = _why_closed(href, access, error)
            if problem is None and pause is not None:
                time.sleep(pause)
                continue
            raise problem or InputError(f"{href} cannot be opened as a raster: {error}") from error
        _answered.add(_place(href))
        return dataset
    raise AssertionError


def _why_closed(href: str, access: AccessSettings, error: Exception) -> Exception | None:
    """Why a raster cannot be opened; None where it is there, and may be damaged or no raster.

    GDAL says "not recognized" of much that the store itself names better.
    """
    folder, _, name = href.rpartition("/")
    if "://" not in href:
        return InputError(f"{href} cannot be opened as a raster: {error}")
    try:
        there = Store.at(folder, access).exists(name)
    except (InputError, OSError) as problem:
        return type(problem)(f"{href} cannot be read: {problem}")
    return None if there else InputError(f"{href}: there is no such file; mend the href")


def _gdal_name(href: str) -> str:
    """GDAL's own name of a URI: with it, rasterio looks for no credentials itself."""
    scheme, _, rest = href.partition("://")
    return f"{_VSI[scheme]}{rest}" if scheme in _VSI else href


def _place(href: str) -> str:
    """The scheme and the bucket or host."""
    return "/".join(href.split("/", 3)[:3])


def gdal_options(href: str, access: AccessSettings) -> dict[str, str]:
    """What GDAL must be told to read an href; nothing, for a file of this machine."""
    scheme = href.partition("://")[0].replace("s3a", "s3")
    if scheme not in _VSI:
        return {}
    options = dict(_REMOTE)
    if _place(href) not in _answered:
        options["GDAL_HTTP_MAX_RETRY"] = "5"
    if scheme == "s3":
        options |= _s3_endpoint()
    options = {name: value for name, value in options.items() if name not in os.environ} | _SAFE
    if access.anonymous:
        options |= {"AWS_NO_SIGN_REQUEST": "YES", "GS_NO_SIGN_REQUEST": "YES"}
        options |= {"AZURE_NO_SIGN_REQUEST": "YES"}
    if access.requester_pays:
        options |= {"AWS_REQUEST_PAYER": "requester"}
        options |= {"GS_USER_PROJECT": paying_project()} if scheme == "gs" else {}
    return options | ({"AWS_REGION": access.region} if access.region else {})


def _s3_endpoint() -> dict[str, str]:
    """AWS_ENDPOINT_URL in GDAL's words."""
    endpoint = s3_endpoint()
    if not endpoint or "AWS_S3_ENDPOINT" in os.environ:
        return {}
    scheme, _, host = endpoint.partition("://")
    return {
        "AWS_S3_ENDPOINT": host,
        "AWS_HTTPS": "NO" if scheme == "http" else "YES",
        "AWS_VIRTUAL_HOSTING": "FALSE",
    }


def geometry_problem(dataset: Any) -> str | None:
    """Why a raster's pixels are not square and aligned to its CRS, or None."""
    transform = dataset.transform
    if dataset.crs is None:
        return "it has no CRS; assign one, for example with gdal_edit.py -a_srs EPSG:..."
    if transform.b or transform.d:
        return f"its pixels are rotated ({tuple(transform)[:6]}); warp it north-up first"
    return None
