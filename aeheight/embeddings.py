"""The AlphaEarth code: int8 to float and back, nodata, bands, the names of tiles.

An AlphaEarth Foundations embedding is a unit vector of 64 numbers, stored as 64 signed bytes `q`
with `u = q / 127.5` and `x = u * |u|`; -128 is nodata, in all bands at once. (Brown et al. 2025,
arXiv 2507.22291, and the data set's own description.)
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BANDS = 64
NODATA = -128
BAND_NAMES = tuple(f"A{band:02d}" for band in range(BANDS))
VERSION = "AlphaEarth Foundations v1"
ATTRIBUTION = (
    "The AlphaEarth Foundations Satellite Embedding dataset is produced by Google and "
    "Google DeepMind."
)
DISCLOSURE = (
    "AlphaEarth Foundations was itself trained with Copernicus DEM and GEDI among its targets."
)

_SCALE = 127.5


def decode_table(nodata: float = np.nan) -> NDArray[np.float32]:
    """The value of every code, shape (256,), in the order of the code's unsigned byte.

    `table[codes.view(uint8)]` decodes; numpy and torch look up the same 256 values, so both give
    the same bits.

    Args:
        nodata: the value that -128 decodes to.
    """
    codes = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
    unit = codes / _SCALE
    return np.where(codes == NODATA, nodata, unit * np.abs(unit)).astype(np.float32)


def decode(codes: NDArray[np.int8], nodata: float = np.nan) -> NDArray[np.float32]:
    """Codes to embedding values in -1..1, of the same shape; -128 becomes `nodata`."""
    return decode_table(nodata)[codes.view(np.uint8)]


def encode(values: NDArray[np.floating]) -> NDArray[np.int8]:
    """Embedding values in -1..1 to codes, of the same shape; NaN becomes -128.

    The nearest code in `u`, the space in which the codes are even: exact for every decoded value.
    """
    values = np.asarray(values, dtype=np.float64)
    unit = np.sign(values) * np.sqrt(np.abs(values))
    codes = np.clip(np.rint(unit * _SCALE), -127, 127)
    return np.where(np.isnan(codes), NODATA, codes).astype(np.int8)


def valid(codes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Where a pixel has an embedding: (64, rows, columns) codes to (rows, columns)."""
    found: NDArray[np.bool_] = codes[0] != NODATA
    return found


@dataclass(frozen=True, slots=True)
class TileName:
    """What the path of a tile says: `.../2024/10N/xcyo46pot2fg6a61t-0000008192-0000000000.tiff`."""

    year: int | None
    """The year of the embedding, where the path names one."""
    zone: str | None
    """UTM zone and hemisphere, such as `10N`."""


_TILE = re.compile(r"(?:^|/)(20\d\d)/(\d{1,2}[NS])/[^/]+$")


def parse_tile_name(path: str) -> TileName:
    """Year and zone of a tile from its path; None for what the path does not say.

    >>> parse_tile_name("annual/2024/10N/xcyo46pot2fg6a61t-0000008192-0000000000.tiff")
    TileName(year=2024, zone='10N')
    """
    match = _TILE.search(path)
    return TileName(int(match[1]), match[2]) if match else TileName(None, None)
