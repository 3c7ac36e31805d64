"""What each shard leaves for the report: sums that merge, and thinned pictures."""

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from aeheight.blocks import Blocks
from aeheight.coregistration import Facets
from aeheight.correlation import Variogram
from aeheight.counts import Counts
from aeheight.crossings import Crossings
from aeheight.errors import InputError
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats
from aeheight.receipts import Ledger
from aeheight.sums import dump, load
from aeheight.template import Shard
from aeheight.windows import Shape

CLASSES = "classes.json"
"""The class rasters' headers, beside the receipts."""

MAP_PIXELS = 600
"""The longer edge of a map in the report is at most this."""

_PICTURES, _PAIRS, _BLOCKS, _LINES = "picture_", "variogram_", "blocks_", "lines_"
"""What the names of such arrays begin with."""


@dataclass(frozen=True, slots=True)
class Part:
    """The sums and pictures of one shard."""

    sums: Mapping[str, Stats | Scatter]
    """By name, such as `model/test` or `slope/test/3`."""
    intervals: Mapping[str, Intervals]
    """Likewise; empty where the map does not tell its spread."""
    variograms: Mapping[str, Variogram]
    """By ground."""
    pictures: Mapping[str, NDArray[Any]]
    """By layer: every `thin`-th pixel of the whole grid that the shard holds, (rows, columns)."""
    blocks: Blocks
    """Of test ground, with the terms of `coregistration`."""
    facets: Facets
    """Of test ground."""
    crossings: Mapping[str, Crossings]
    """At the seams of `windows` and of `shards`, on all ground."""

    def to_bytes(self) -> bytes:
        """An npz and its CRC-32; the same sums give the same bytes."""
        arrays: dict[str, NDArray[Any]] = {"sums": np.frombuffer(dump(self.sums), dtype=np.uint8)}
        arrays |= {_PICTURES + name: values for name, values in self.pictures.items()}
        for ground, pairs in self.variograms.items():
            arrays[_PAIRS + ground] = np.stack([pairs.pairs, pairs.squares])
        arrays |= {_BLOCKS + name: values for name, values in self.blocks.arrays().items()}
        arrays |= {_LINES + name: lines.sums for name, lines in self.crossings.items()}
        arrays["facet_bins"], arrays["facet_counts"] = (
            self.facets.cells.bins,
            self.facets.cells.counts,
        )
        arrays["facet_gradients"] = self.facets.gradients
        if self.intervals:
            arrays["intervals"] = np.stack([part.sums for part in self.intervals.values()])
            arrays["interval_keys"] = np.array(list(self.intervals))
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        data = buffer.getvalue()
        return data + _crc(data)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` made.

        Raises:
            ValueError: the bytes are damaged.
            InputError: its sums are, or are of another format version.
        """
        if len(data) < _CRC or data[-_CRC:] != _crc(data[:-_CRC]):
            raise ValueError(f"{len(data)} bytes that do not agree with their checksum")
        with np.load(io.BytesIO(data[:-_CRC]), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        rows = zip(arrays.pop("interval_keys", ()), arrays.pop("intervals", ()), strict=True)
        return cls(
            load(arrays.pop("sums").tobytes()),
            {str(name): Intervals(sums) for name, sums in rows},
            {
                name: Variogram(pairs.astype(np.int64), squares)
                for name, (pairs, squares) in _named(arrays, _PAIRS).items()
            },
            _named(arrays, _PICTURES),
            Blocks.from_arrays(_named(arrays, _BLOCKS)),
            Facets(Counts(arrays["facet_bins"], arrays["facet_counts"]), arrays["facet_gradients"]),
            {name: Crossings(sums) for name, sums in _named(arrays, _LINES).items()},
        )


_CRC = 4


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC, "big")


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def part_key(key: str, shard: Shard) -> str:
    """Where the part of a shard lies, beside its receipt; `key` is the ledger's."""
    return f"{key}/{shard.name}.npz"


def read_part(ledger: Ledger, shard: Shard) -> Part:
    """The part of a finished shard.

    Raises:
        InputError: it is damaged.
    """
    key = part_key(ledger.key, shard)
    try:
        return Part.from_bytes(ledger.store.read(key))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{ledger.store.uri}/{key} is damaged ({error}); run aeheight evaluate --overwrite"
        ) from error


def thin(shape: Shape) -> int:
    """Every how many pixels the report's maps take one."""
    return -(-max(shape) // MAP_PIXELS)
