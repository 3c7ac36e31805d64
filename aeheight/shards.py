"""A whole shard as the bytes that Zarr v3 stores: its chunks, compressed, then their index.

Zarr would read the old shard before it replaces one, and holds several copies of a chunk while it
encodes; measured beside it, this takes 0.85 of the CPU and a third of the memory
(tests/benchmarks/RESULTS.md). Zarr itself reads what is written here.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import google_crc32c
import numpy as np
from dask.system import CPU_COUNT
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

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
