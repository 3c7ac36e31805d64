"""A whole shard as the bytes that Zarr v3 stores: its chunks, compressed, then their index.

Zarr would read the old shard before it replaces one, and holds several copies of a chunk while it
encodes or decodes; measured beside it, writing takes 0.85 of the CPU and a third of the memory,
reading 0.7 and 0.2 (tests/benchmarks/RESULTS.md). Zarr itself reads what is written here.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

import os
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import google_crc32c
import numpy as np
from dask.system import CPU_COUNT
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from aeheight.windows import Region

_CODEC: Final = "zstd"
_LEVEL = 3
_ABSENT = 2**64 - 1
_local = threading.local()


def compressors(dtype: str) -> list[Any]:
    """The codecs of a chunk, as Zarr's metadata names them."""
    size = np.dtype(dtype).itemsize
    packed = BloscCodec(cname=_CODEC, clevel=_LEVEL, shuffle="bitshuffle", typesize=size)
    return [packed, Crc32cCodec()]


def encode_shard(values: NDArray[Any], shard: int, chunk: int, nodata: float) -> bytes | None:
    """The stored object of a shard, or None where all of it is nodata (Zarr stores none then).

    Args:
        values: (bands,) rows, columns; fewer than `shard` where the grid ends.
        shard: edge in pixels.
        chunk: edge in pixels, a divisor of `shard`.
        nodata: what fills the rest of a clipped shard, and makes a chunk empty.
    """
    cells = list(np.ndindex(shard // chunk, shard // chunk))
    pieces = _pool().map(_encoder(values, chunk, nodata), cells)
    index = np.full((shard // chunk, shard // chunk, 2), _ABSENT, dtype="<u8")
    stored: list[bytes] = []
    end = 0
    for cell, piece in zip(cells, pieces, strict=True):
        if piece is not None:
            index[cell] = end, len(piece)
            end += len(piece)
            stored.append(piece)
    return b"".join([*stored, _sealed(index.tobytes())]) if stored else None


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk of a shard is stored."""

    square: Region
    """Its pixels, those past the grid's edge too."""
    start: int
    size: int
    """Bytes; 0: all of it is nodata, nothing is stored."""


def index_size(shard: int, chunk: int) -> int:
    """Bytes of the index at the end of a stored shard."""
    return (shard // chunk) ** 2 * 16 + 4


def places(index: bytes, cell: Region, chunk: int, region: Region) -> list[Place]:
    """The chunks of a stored shard that touch a region.

    Args:
        index: the last `index_size` bytes of the stored object.
        cell: the shard's pixels, not clipped.
        chunk: edge in pixels.
        region: of the same grid.

    Raises:
        ValueError: the index is damaged.
    """
    cells = _opened(index, index_size(cell.height, chunk)).view("<u8")
    squares = (
        Region(cell.row + row, cell.col + col, chunk, chunk)
        for row in range(0, cell.height, chunk)
        for col in range(0, cell.width, chunk)
    )
    return [
        Place(square, int(start), 0 if start == _ABSENT else int(size))
        for square, (start, size) in zip(squares, cells.reshape(-1, 2), strict=True)
        if square.intersect(region)
    ]


def decode(
    stored: Iterable[tuple[Place, bytes]], region: Region, out: NDArray[Any], nodata: float
) -> None:
    """Put what some chunks hold of a region into an array; what they do not hold stays as it is.

    Args:
        stored: chunks, and the bytes of each (of any length, where nothing is stored).
        region: the pixels of `out`.
        out: (bands,) rows, columns.
        nodata: what an absent chunk holds.

    Raises:
        ValueError: a chunk is damaged.
    """

    def put(piece: tuple[Place, bytes]) -> None:
        place, data = piece
        shared = place.square.intersect(region)
        if shared is None:
            return
        target = out[(..., *shared.within(region).slices)]
        if not place.size:
            target[...] = nodata
            return
        chunk = _buffer((*out.shape[:-2], *place.square.shape), out.dtype)
        blosc.decompress(_opened(data, place.size), chunk)
        target[...] = chunk[(..., *shared.within(place.square).slices)]

    for _ in _pool().map(put, stored):
        pass


def _opened(data: bytes, size: int) -> NDArray[np.uint8]:
    """What was `_sealed`.

    Raises:
        ValueError: these are not the bytes that were.
    """
    found = np.frombuffer(data, np.uint8)
    if len(found) != size or google_crc32c.value(found[:-4]) != int(found[-4:].view("<u4")[0]):
        raise ValueError("bytes are damaged or missing: the CRC-32C does not fit")
    return found[:-4]


def _encoder(
    values: NDArray[Any], edge: int, nodata: float
) -> Callable[[tuple[int, ...]], bytes | None]:
    def encode(cell: tuple[int, ...]) -> bytes | None:
        rows, cols = (slice(k * edge, (k + 1) * edge) for k in cell)
        part = values[..., rows, cols]
        if not part.size:
            return None
        chunk = _buffer((*values.shape[:-2], edge, edge), values.dtype)
        if part.shape != chunk.shape:
            chunk.fill(nodata)
        chunk[..., : part.shape[-2], : part.shape[-1]] = part
        if _is_empty(chunk, nodata):
            return None
        name, size = _CODEC.encode(), chunk.itemsize
        return _sealed(blosc.compress(chunk, name, _LEVEL, blosc.BITSHUFFLE, typesize=size))

    return encode


def _buffer(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A thread's own chunk, used again: fresh memory costs as much as the codec."""
    held: NDArray[Any] | None = getattr(_local, "chunk", None)
    if held is None or held.shape != shape or held.dtype != dtype:
        held = _local.chunk = np.empty(shape, dtype=dtype)
    return held


def _is_empty(chunk: NDArray[Any], nodata: float) -> bool:
    if np.isnan(nodata):
        return bool(np.isnan(chunk.flat[0]) and np.isnan(chunk).all())
    return bool(chunk.flat[0] == nodata and (chunk == nodata).all())


def _sealed(data: bytes) -> bytes:
    """With the CRC-32C behind it."""
    return data + struct.pack("<I", google_crc32c.value(data))


@cache
def _pool() -> ThreadPoolExecutor:
    """One a process, of as many threads as its share of the cores: OMP_NUM_THREADS, where set."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(share) if share.isdecimal() and int(share) else CPU_COUNT
    return ThreadPoolExecutor(threads, thread_name_prefix="encode")
