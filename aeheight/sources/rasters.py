"""Height rasters: what a header promises, checked, and pixels with NaN for what is missing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.errors import RasterioIOError
from rasterio.windows import Window

from aeheight.errors import InputError
from aeheight.grid import Bounds, crs_name
from aeheight.settings import AccessSettings, HeightSettings
from aeheight.sources.datum import vertical_problem
from aeheight.sources.files import geometry_problem, opened, read_raster
from aeheight.sources.resample import Lattice
from aeheight.windows import Region, Shape

LOWEST, HIGHEST = -500.0, 9000.0
"""Metres: no surface of the Earth lies outside; what does is a missing-value nobody declared."""

_METRES = ("", "m", "metre", "metres", "meter", "meters", "unknown")
"""What a band's unit may be, in small letters."""

_OPEN = 128
"""Files that are held open at once, so that blocks under two squares are decoded once."""

_OFF = 1e-2
"""Pixels: a STAC item and its file lie in the same place if no corner is further off."""


@dataclass(frozen=True, slots=True)
class Raster:
    """One single-band raster, or the asset of one STAC item, as its header (or item) has it."""

    href: str
    crs: str
    """Horizontal only; see `grid.crs_name`."""
    transform: tuple[float, float, float, float, float, float]
    """dx, 0, left, 0, dy, top; dy is above 0 in a file whose first row is the southernmost."""
    shape: Shape
    """Rows and columns."""
    nodata: float | None
    """What a missing pixel holds beside NaN; None: nothing."""
    item: dict[str, Any] | None = None
    """What stackstac needs of a STAC item: `id`, `properties.datetime` and the one asset."""
    mosaic: tuple[float, float, float, float] | None = None
    """Width and height of a pixel, western and northern edge of one, of the lattice that the raster
    shares with its neighbours; None: its own."""

    @property
    def bounds(self) -> Bounds:
        """In its own CRS."""
        dx, _, left, _, dy, top = self.transform
        other = top + dy * self.shape[0]
        return left, min(top, other), left + dx * self.shape[1], max(top, other)

    @property
    def resolution(self) -> tuple[float, float]:
        """Width and height of a pixel in units of its own CRS."""
        return abs(self.transform[0]), abs(self.transform[4])

    @property
    def own_lattice(self) -> Lattice:
        """Row 0 and column 0 are its own, north-up."""
        left, _, _, top = self.bounds
        return Lattice(self.crs, *self.resolution, left, top)

    @property
    def lattice(self) -> Lattice:
        """The one that it shares."""
        return Lattice(self.crs, *self.mosaic) if self.mosaic else self.own_lattice

    @property
    def place(self) -> Region:
        """Its pixels on that lattice."""
        lattice, (left, _, _, top) = self.lattice, self.bounds
        row, col = (lattice.top - top) / lattice.dy, (left - lattice.left) / lattice.dx
        return Region(round(row), round(col), *self.shape)


def read_header(
    href: str, wanted: HeightSettings, key: str, access: AccessSettings | None = None
) -> Raster:
    """A raster as its header has it.

    Raises:
        InputError: the file cannot be opened, or is no height model of the settings' kind.
    """
    with opened(href, access or wanted.access) as dataset:
        problem = (
            (dataset.crs and vertical_problem(dataset.crs.to_wkt(), wanted.vertical_datum))
            or header_problem(dataset)
            or _nodata_problem(dataset, wanted.nodata)
        )
        if problem:
            raise InputError(f"{key}: {href}: {problem}")
        declared = dataset.nodata if dataset.nodata is not None else wanted.nodata
        nodata = None if declared is None or np.isnan(declared) else float(declared)
        return as_raster(href, dataset, nodata)


def as_raster(href: str, dataset: Any, nodata: float | None) -> Raster:
    """An open dataset as its header has it."""
    dx, _, left, _, dy, top = (float(number) for number in dataset.transform[:6])
    crs = horizontal(dataset.crs.to_wkt())
    return Raster(href, crs, (dx, 0.0, left, 0.0, dy, top), dataset.shape, nodata)


@lru_cache(maxsize=256)
def horizontal(crs: str) -> str:
    """The name of a CRS (WKT or code) without its heights; see `grid.crs_name`."""
    return crs_name(CRS.from_user_input(crs).to_2d())


def header_problem(dataset: Any) -> str | None:
    """Why an open raster holds no plain heights in metres, or None."""
    if dataset.count != 1:
        return f"it has {dataset.count} bands; a height model has one"
    scale, offset = dataset.scales[0], dataset.offsets[0]
    if (scale, offset) != (1, 0):
        return (
            f"its values are to be scaled ({scale:g}) and shifted ({offset:g}); write plain "
            "metres first, for example with gdal_translate -unscale -ot Float32"
        )
    return unit_problem(dataset.units[0]) or geometry_problem(dataset) or _gone(dataset)


def unit_problem(unit: str | None) -> str | None:
    """Why a band's unit is not metres, or None (also where it is not given)."""
    if unit is None or unit.strip().lower() in _METRES:
        return None
    return (
        f"its heights are in {unit!r}; write metres first (feet: gdal_calc.py -A in.tif "
        '--calc="A*0.3048" --outfile=out.tif), or, if they are metres, mend the tag '
        "(gdal_edit.py -units m)"
    )


def _gone(dataset: Any) -> str | None:
    """A VRT's files are looked for now: GDAL would miss them in mid-read."""
    if dataset.driver != "VRT":
        return None
    gone = [file for file in dataset.files if "://" not in file and not _exists(file)]
    return (
        f"it is made of files of which {len(gone)} are missing, such as {gone[0]}" if gone else None
    )


def _exists(file: str) -> bool:
    return file.startswith("/vsi") or Path(file).exists()


def _nodata_problem(dataset: Any, wanted: float | None) -> str | None:
    declared = dataset.nodata
    if None not in (wanted, declared) and declared != wanted:
        return (
            f"it declares {declared:g} as its missing-value, `nodata` says {wanted:g}; leave "
            "`nodata` out, or mend the file (gdal_edit.py -a_nodata)"
        )
    missing = wanted if declared is None else declared
    for name in ("STATISTICS_MINIMUM", "STATISTICS_MAXIMUM"):
        value = _number(dataset.tags(1).get(name))
        if value is not None and not LOWEST <= value <= HIGHEST and value != missing:
            return f"its header gives {value:g} m as an extreme, which no ground has; " + _remedy(
                missing
            )
    return None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _remedy(missing: float | None) -> str:
    if missing is None:
        return "if that is a missing-value that the file does not declare, name it in `nodata`"
    return (
        f"the missing-value declared is {missing:g}: declare the true one (gdal_edit.py "
        "-a_nodata), or turn the stray pixels into it (gdal_calc.py)"
    )


class Readers:
    """Rasters that are held open while one region is read; left as a context."""

    def __init__(self, access: AccessSettings) -> None:
        self._access = access
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "Readers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, raster: Raster, part: Region) -> NDArray[np.float32]:
        """Heights of a part of a raster, north-up, NaN where missing.

        Args:
            raster: from a header or an item.
            part: pixels, counted from its north-western corner.

        Raises:
            OSError: the file breaks off.
            InputError: it is not what the item says; a height that no ground on Earth has.
        """
        row = raster.shape[0] - part.bottom if raster.transform[4] > 0 else part.row
        window = Window(part.col, row, part.width, part.height)

        def pixels(dataset: Any) -> Any:
            return dataset.read(1, window=window, masked=True)

        try:
            with _broken(raster.href):
                values = pixels(self._dataset(raster))
        except OSError:
            if "://" not in raster.href:
                raise
            self._close()  # a dataset whose read has failed stays broken
            values = read_raster(raster.href, pixels, self._access)
        heights = _plain(values, raster)
        return heights[::-1] if raster.transform[4] > 0 else heights

    def _dataset(self, raster: Raster) -> Any:
        if raster.href not in self._open:
            if len(self._open) >= _OPEN:
                self._close()
            dataset = self._stack.enter_context(opened(raster.href, self._access))
            problem = header_problem(dataset)
            # An item may say something else than its file; a file may have been replaced.
            if problem := problem or place_problem(as_raster("", dataset, None), raster):
                raise InputError(f"{raster.href}: {problem}")
            self._open[raster.href] = dataset
        return self._open[raster.href]


@contextmanager
def _broken(href: str) -> Iterator[None]:
    try:
        yield
    except RasterioIOError as error:
        cause = error.__cause__ or error
        raise OSError(f"{href} breaks off while it is read: {cause}") from error


def place_problem(file: Raster, told: Raster) -> str | None:
    """Why a file does not lie where a STAC item, or its header at the plan, put it, or None."""
    dx, dy = file.resolution
    off = np.abs(np.subtract(file.bounds, told.bounds)) / (dx, dy, dx, dy)
    if file.crs == told.crs and file.shape == told.shape and off.max() < _OFF:
        return None
    return (
        f"the file is {file.crs}, {file.shape[0]} x {file.shape[1]} pixels, bounds "
        f"{list(file.bounds)}, but was described as {told.crs}, {told.shape[0]} x {told.shape[1]}, "
        f"{list(told.bounds)}; mend the STAC item, or give the file itself with source: raster"
    )


def _plain(values: Any, raster: Raster) -> NDArray[np.float32]:
    """Metres as float32, NaN where missing."""
    missing = np.ma.getmask(values)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 missing-values
        if raster.nodata is not None:
            missing = missing | (values.data == raster.nodata)
        heights: NDArray[np.float32] = values.data.astype(np.float32, copy=False)
    if missing is not np.ma.nomask:
        heights[missing] = np.nan
    strange = heights[(heights < LOWEST) | (heights > HIGHEST)]
    if strange.size:
        raise InputError(
            f"{raster.href}: {strange.size} heights like {strange[0]:g} m lie outside "
            f"{LOWEST:g} to {HIGHEST:g} m; " + _remedy(raster.nodata)
        )
    return heights
