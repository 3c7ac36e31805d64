"""What is written is what Zarr would have written: as long, and read by Zarr as it was."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from aeheight.shards import compressors, encode_shard

NODATA = {"int8": -128, "uint8": 0, "float32": np.nan}


def array(
    dtype: str, shape: tuple[int, ...], shard: int, chunk: int
) -> tuple[MemoryStore, zarr.Array]:
    """An empty array in aeheight's layout."""
    lead = shape[:-2]
    store = MemoryStore()
    return store, zarr.create_array(
        store, shape=shape, chunks=(*lead, chunk, chunk), shards=(*lead, shard, shard),
        dtype=dtype, fill_value=np.dtype(dtype).type(NODATA[dtype]), compressors=compressors(dtype),
    )  # fmt: skip


def stored(store: MemoryStore) -> dict[str, bytes]:
    return {key: value.to_bytes() for key, value in store._store_dict.items() if "/c/" in f"/{key}"}


def random_values(
    rng: np.random.Generator, dtype: str, shape: tuple[int, ...], holes: float
) -> np.ndarray:
    """Values with nodata in whole blocks of 8 pixels, so that some chunks are empty."""
    if dtype == "float32":
        values = rng.normal(100, 40, shape).astype(np.float32)
    else:
        values = rng.integers(-127, 128, shape).astype(dtype)
    rows, cols = (-(-size // 8) for size in shape[-2:])
    missing = np.kron(rng.random((rows, cols)) < holes, np.ones((8, 8), bool))
    values[..., missing[: shape[-2], : shape[-1]]] = NODATA[dtype]
    return values


@given(
    dtype=st.sampled_from(sorted(NODATA)),
    bands=st.sampled_from([(), (3,)]),
    size=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    chunk=st.sampled_from([8, 16, 32]),
    holes=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_zarr_reads_what_is_written(
    dtype: str,
    bands: tuple[int, ...],
    size: tuple[int, int],
    chunk: int,
    holes: float,
    seed: int,
) -> None:
    shape = (*bands, *size)
    values = random_values(np.random.default_rng(seed), dtype, shape, holes)
    data = encode_shard(values, 32, chunk, NODATA[dtype])
    mine, theirs = (array(dtype, shape, 32, chunk) for _ in range(2))
    theirs[1][...] = values
    (wanted,) = stored(theirs[0]).values() or [None]
    assert (data is None) == (wanted is None)
    if data is not None:
        key = next(iter(stored(theirs[0])))
        mine[0]._store_dict[key] = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(
            data
        )
        assert wanted is not None
        assert len(data) == len(wanted)
    np.testing.assert_array_equal(mine[1][...], values)


def test_a_flipped_byte_is_an_error() -> None:
    values = random_values(np.random.default_rng(1), "int8", (3, 32, 32), 0.0)
    data = encode_shard(values, 32, 16, -128)
    assert data is not None
    for place in range(0, len(data), 97):
        store, target = array("int8", (3, 32, 32), 32, 16)
        damaged = bytearray(data)
        damaged[place] ^= 0x40
        buffer = zarr.core.buffer.default_buffer_prototype().buffer
        store._store_dict["c/0/0/0"] = buffer.from_bytes(bytes(damaged))
        with pytest.raises(Exception, match=r"(?i)checksum|index|out of|decompress|blosc"):
            target[...]
