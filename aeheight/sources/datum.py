"""Vertical datums: known to PROJ, the same in files and settings, and converted on demand."""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.aoi import AreaOfInterest
from pyproj.crs import CompoundCRS
from pyproj.exceptions import CRSError, ProjError
from pyproj.transformer import TransformerGroup

from aeheight.errors import InputError
from aeheight.grid import Bounds, Grid, transformer
from aeheight.windows import Region

_COMMON = {
    "EGM96": "EPSG:5773",
    "EGM2008": "EPSG:3855",
    "EGM84": "EPSG:5798",
    "WGS84 ellipsoid": "EPSG:4979",
    "ellipsoidal": "EPSG:4979",
    "NAVD88": "EPSG:5703",
    "CGVD2013": "EPSG:6647",
    "EVRF2000": "EPSG:5730",
    "EVRF2007": "EPSG:5621",
    "EVRF2019": "EPSG:9389",
    "NGF-IGN69": "EPSG:5720",
    "DHHN2016": "EPSG:7837",
    "NAP": "EPSG:5709",
    "ODN Newlyn": "EPSG:5701",
    "AHD": "EPSG:5711",
    "NZVD2016": "EPSG:7839",
    "JGD2011": "EPSG:6695",
}
"""What people write, and its code."""

_PROBES = 5
"""Places along each side of an area at which a shift is recorded."""

_SAME = 1e-4
"""Metres: two installations shift alike if no probe differs by more."""


@dataclass(frozen=True, slots=True)
class DatumShift:
    """How heights of one vertical datum become heights of another, as PROJ does it here."""

    source: str
    """As in the settings of the prior."""
    target: str
    """As in the settings of the height."""
    operation: str
    """PROJ's name of what is done."""
    pipeline: str
    """The same for machines: longitude, latitude (degrees) and height to the same."""
    grids: tuple[str, ...]
    """Files that PROJ needs for it."""
    accuracy: float | None
    """Metres, as PROJ states it; None: unknown."""
    probes: tuple[tuple[float, float, float], ...]
    """Longitude, latitude, and metres added there: another machine must find the same."""


def check_datum(text: str, key: str) -> None:
    """Refuse what is no vertical CRS in metres.

    Args:
        text: as written, such as `EPSG:5773`.
        key: the setting, for messages.

    Raises:
        InputError: PROJ does not know it, or it says nothing of heights, or is not in metres.
    """
    try:
        axis = _heights(text).axis_info[-1]
    except CRSError as error:
        raise InputError(f"{key}: PROJ does not know {text!r}; {_nearest(text)}") from error
    except LookupError:
        raise InputError(
            f"{key}: {text!r} says nothing of heights; name a vertical CRS: {_nearest(text)}"
        ) from None
    if axis.direction != "up" or axis.unit_conversion_factor != 1:
        raise InputError(
            f"{key}: {text!r} counts {axis.unit_name} {axis.direction}; heights here are metres "
            'upwards: convert the file (feet: gdal_calc.py -A in.tif --calc="A*0.3048") and name '
            "the datum's CRS in metres"
        )


def compound(crs: str, datum: str) -> CRS | None:
    """A map's CRS with its heights' datum, as one CRS.

    Args:
        crs: of the map.
        datum: vertical datum, as `check_datum` has it.

    Returns:
        None where the datum is an ellipsoid, which no compound CRS can hold, or where PROJ does
        not know it.
    """
    try:
        flat, heights = CRS.from_user_input(crs), _heights(datum)
        if not heights.is_vertical:
            return None
        return CompoundCRS(f"{flat.name} + {heights.name}", [flat, heights])
    except (CRSError, LookupError):
        return None


def _nearest(text: str) -> str:
    folded = {name.lower().replace(" ", ""): name for name in _COMMON}
    found = difflib.get_close_matches(text.lower().replace(" ", ""), folded, n=3, cutoff=0.5)
    names = [folded[name] for name in found] or ["EGM96", "EGM2008", "NAVD88", "WGS84 ellipsoid"]
    return "for example " + ", ".join(f"{_COMMON[name]} ({name})" for name in names)


@lru_cache(maxsize=64)
def _heights(text: str) -> CRS:
    """The vertical CRS, or the three-dimensional one in degrees, that a text names.

    Raises:
        CRSError: PROJ does not know it.
        LookupError: it has no heights.
    """
    crs = CRS.from_user_input(text)
    if crs.is_compound:
        crs = crs.sub_crs_list[-1]
    if not crs.is_vertical and not (crs.is_geographic and len(crs.axis_info) == 3):
        raise LookupError(text)
    return crs


@lru_cache(maxsize=256)
def vertical_problem(wkt: str, declared: str) -> str | None:
    """Why a file's own CRS contradicts the vertical datum of the settings, or None.

    Args:
        wkt: of the file.
        declared: `vertical_datum`.
    """
    try:
        own = _heights(wkt)
    except LookupError:
        return None
    axis = own.axis_info[-1]
    if axis.unit_conversion_factor != 1:
        return (
            f"its heights are in {axis.unit_name} ({own.name}); write metres first: gdal_calc.py "
            f'-A in.tif --calc="A*{axis.unit_conversion_factor:.12g}" --outfile=out.tif, with a '
            "vertical CRS in metres"
        )
    told = _heights(declared)
    if own.name.lower().startswith("un") or own.equals(told) or own.name == told.name:
        return None
    return (
        f"its header gives its vertical datum as {_named(own)}, `vertical_datum` says {declared} "
        f"({told.name}); name the file's, or mend the file (gdal_edit.py -a_srs)"
    )


def _named(crs: CRS) -> str:
    code = crs.to_authority(min_confidence=70)
    return f"{':'.join(code)} ({crs.name})" if code else crs.name


_LEAVE = (
    "or set `prior.convert: false` to leave the prior's heights as they are (recorded; a constant "
    "difference is learnt by the model, the rest stays in the prior)"
)


def plan_shift(
    source: str, target: str, area: Bounds, whose: str = "the prior's", otherwise: str = _LEAVE
) -> DatumShift | None:
    """How to convert heights, with the grids that are installed; None where there is nothing to do.

    Of the operations that PROJ knows for the area, the first (the best) whose grids are here and
    cover it; a ballpark is never taken.

    Args:
        source: the vertical datum to convert from.
        target: the vertical datum to convert to.
        area: west, south, east, north in degrees; across the 180th meridian west is above east.
        whose: heights these are, for messages.
        otherwise: what else a user may do, for messages.

    Raises:
        InputError: a grid file is missing, or does not cover the area; PROJ knows no way.
    """
    one, other = _heights(source), _heights(target)
    if one.equals(other):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of missing grids: asked below
        group = TransformerGroup(
            _with_degrees(one),
            _with_degrees(other),
            always_xy=True,
            allow_ballpark=False,
            area_of_interest=AreaOfInterest(*area),  # type: ignore[arg-type]  # the same class
        )
    places = _places(area)
    for found in group.transformers:
        added = _added(found, *places)
        if np.isfinite(added).all():
            return _recorded(source, target, found, places, added)
    raise InputError(_missing(f"{whose} heights ({source})", target, area, group, otherwise))


def _with_degrees(heights: CRS) -> CRS:
    if heights.is_geographic:
        return heights
    return CompoundCRS(f"WGS 84 + {heights.name}", [CRS.from_epsg(4326), heights])


def _places(area: Bounds) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) longitudes and (n,) latitudes spread over an area."""
    west, south, east, north = area
    lons = np.linspace(west, east if west <= east else east + 360, _PROBES)
    lon, lat = np.meshgrid((lons + 180) % 360 - 180, np.linspace(south, north, _PROBES))
    return np.round(lon.ravel(), 6), np.round(lat.ravel(), 6)


def _added(
    how: Transformer, lon: NDArray[np.float64], lat: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) metres added to a height of 0."""
    return np.asarray(how.transform(lon, lat, np.zeros(len(lon)))[2], dtype=np.float64)


def _recorded(
    source: str,
    target: str,
    found: Transformer,
    places: tuple[NDArray[np.float64], NDArray[np.float64]],
    added: NDArray[np.float64],
) -> DatumShift:
    operations: Sequence[Any] = found.operations or ()
    grids = {grid.short_name for operation in operations for grid in operation.grids}
    probes = [
        (float(x), float(y), round(float(z), 6)) for x, y, z in zip(*places, added, strict=True)
    ]
    return DatumShift(
        source,
        target,
        found.description,
        found.definition,
        tuple(sorted(grids)),
        found.accuracy if found.accuracy >= 0 else None,
        tuple(probes),
    )


def _missing(heights: str, target: str, area: Bounds, group: TransformerGroup, ask: str) -> str:
    absent = [
        grid.short_name
        for o in group.unavailable_operations[:1]
        for grid in o.grids
        if not grid.available
    ]
    if absent:
        files = " and ".join(absent)
        commands = "; ".join(f"pyproj sync --file {name}" for name in absent)
        return (
            f"{heights} are to be converted to {target}, for which PROJ needs "
            f"{files}: install it ({commands}), or point PROJ_DATA to a folder that holds it, or "
            f"set PROJ_NETWORK=ON, {ask}"
        )
    why = (
        "the grids that are installed do not cover"
        if group.transformers
        else "PROJ knows no way in"
    )
    return (
        f"{heights} cannot be converted to {target}: {why} "
        f"{[round(edge, 4) for edge in area]}; convert the files to {target} first, {ask}"
    )


def shifted(
    shift: DatumShift, heights: NDArray[np.float32], grid: Grid, region: Region
) -> NDArray[np.float32]:
    """Heights of a region in the other datum.

    The shift is taken at pixel centres, after resampling: the separation of two datums is smooth
    (centimetres a kilometre), so that the order does not matter.

    Args:
        shift: from `plan_shift`.
        heights: (rows, columns) metres.
        grid: the whole grid.
        region: where the heights lie.

    Raises:
        InputError: this machine's PROJ shifts otherwise than the one of the plan, or a pixel lies
            outside PROJ's grids.
    """
    known = np.isfinite(heights)
    if not known.any():
        return heights
    part = grid.part(region)
    x, y = (axis[known] for axis in np.meshgrid(part.x(), part.y()))
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(x, y)
    found = np.asarray(_proven(shift).transform(lon, lat, heights[known].astype(np.float64))[2])
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found))[0]
        raise InputError(
            f"PROJ's grids {list(shift.grids)} do not cover {lon[bad]:.4f}, {lat[bad]:.4f}, where "
            "the prior has heights; convert the files first, or set `prior.convert: false`"
        )
    out = heights.copy()
    out[known] = found
    return out


@lru_cache(maxsize=8)
def _proven(shift: DatumShift) -> Transformer:
    """The transformer of a plan, if this machine's does the same."""
    lon, lat, told = np.array(shift.probes, dtype=np.float64).T
    try:
        how = Transformer.from_pipeline(shift.pipeline)
        added = _added(how, lon, lat)
    except ProjError as error:
        raise InputError(_other(shift, f"PROJ fails: {error}")) from error
    off = np.abs(added - told)
    if not (off <= _SAME).all():
        worst = int(np.argmax(np.where(np.isfinite(off), off, np.inf)))
        raise InputError(
            _other(shift, f"at {lon[worst]}, {lat[worst]} it adds {added[worst]:g} m "
                          f"instead of {told[worst]:g} m")
        )  # fmt: skip
    return how


def _other(shift: DatumShift, why: str) -> str:
    return (
        f"this machine's PROJ does not convert {shift.source} to {shift.target} as the plan's did "
        f"({shift.operation}): {why}; install the same {list(shift.grids) or 'PROJ'} on every "
        "worker (PROJ_DATA)"
    )
