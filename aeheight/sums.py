"""Named sums: tables of them merge name by name, and travel as compact bytes."""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight.counts import Counts
from aeheight.errors import InputError
from aeheight.metrics import Scatter, Stats

FORMAT: Final = "aeheight-sums"
FORMAT_VERSION: Final = 3

_KEYS: Final = {"Stats": "histogram", "Scatter": "cells"}
"""The field of each that holds its histogram."""

_NONE: Final = np.empty(0, np.int64)

Table = Mapping[str, Stats | Scatter]
"""Named sums of one piece of ground, such as "model/test"."""


def merge(parts: Iterable[Stats]) -> Stats:
    """Sum of all parts, as :func:`merge_tables` adds them; none gives ``Stats.zero()``."""
    total = merge_tables({"": part} for part in parts).get("", Stats.zero())
    assert isinstance(total, Stats)
    return total


def merge_tables(tables: Iterable[Table]) -> dict[str, Stats | Scatter]:
    """Sum of all tables, name by name; a name that a table lacks counts as zero.

    Tables are added in pairs, as a balanced tree: rounding and work grow with the logarithm of
    their number, and no more than that many are held. Their order decides the last bits of the
    moments: sort them for equal bytes.
    """
    held: list[tuple[int, Table]] = []
    for table in tables:
        level, total = 0, table
        while held and held[-1][0] == level:
            total = _add_tables(held.pop()[1], total)
            level += 1
        held.append((level, total))
    whole: Table = {}
    for _, part in reversed(held):
        whole = _add_tables(part, whole)
    return dict(whole)


def dump(table: Table) -> bytes:
    """Named sums as compact bytes; the same sums give the same bytes, in any order of names.

    JSON, and behind it the steps from one filled bin to the next and the counts of all histograms,
    each in as few bytes as its largest needs.
    """
    names = sorted(table)
    held = [_counts(table[name]) for name in names]
    steps = _narrow(np.concatenate([_NONE, *(np.diff(counts.bins) for counts in held)]))
    counts = _narrow(np.concatenate([_NONE, *(counts.counts for counts in held)]))
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "types": [steps.dtype.str, counts.dtype.str],
        "sums": {name: _plain(table[name], own) for name, own in zip(names, held, strict=True)},
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    return zlib.compress(b"\0".join((text, steps.tobytes() + counts.tobytes())), 1)


def load(data: bytes) -> dict[str, Stats | Scatter]:
    """Read what :func:`dump` wrote, bit for bit.

    Raises:
        InputError: the bytes are damaged, something else, or of another format version.
    """
    try:
        text, _, arrays = zlib.decompress(data).partition(b"\0")
        document = json.loads(text)
        found = document["format"], document["version"]
        if found == (FORMAT, FORMAT_VERSION):
            return dict(_restored(document, arrays))
    except (zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"stored sums cannot be read ({len(data)} bytes: {error}); "
            "evaluate again with --overwrite"
        ) from error
    raise InputError(
        f"stored sums have format {found[0]!r} version {found[1]!r}, and this aeheight reads "
        f"{FORMAT!r} version {FORMAT_VERSION}; evaluate again with --overwrite"
    )


def _add_tables(first: Table, second: Table) -> Table:
    total = dict(first)
    for name, part in second.items():
        held = total.get(name)
        if held is not None and type(held) is not type(part):
            raise InputError(f"{name!r} is Stats in one table and Scatter in another; name it anew")
        total[name] = part if held is None else held + part  # type: ignore[operator]
    return total


def _counts(part: Stats | Scatter) -> Counts:
    return part.histogram if isinstance(part, Stats) else part.cells


def _plain(part: Stats | Scatter, counts: Counts) -> dict[str, Any]:
    """Sums as JSON can hold them; of their bins the first and how many are filled."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    first = counts.bins[:1].tolist()
    told = {name: [*first, counts.bins.size] for name in values if values[name] is counts}
    return {"kind": type(part).__name__} | values | told


def _restored(document: Mapping[str, Any], arrays: bytes) -> Iterator[tuple[str, Stats | Scatter]]:
    """The sums of a dumped document, by name."""
    types = [np.dtype(name) for name in document["types"]]
    sums = document["sums"].items()
    filled = sum(_held(entry)[-1] for _, entry in sums)
    gaps = sum(max(_held(entry)[-1] - 1, 0) for _, entry in sums)
    steps = np.frombuffer(arrays, types[0], gaps)
    counts = np.frombuffer(arrays, types[1], filled, gaps * types[0].itemsize)
    for name, entry in sums:
        *first, size = _held(entry)
        own, steps = steps[: max(size - 1, 0)], steps[max(size - 1, 0) :]
        bins = np.cumsum(np.concatenate([np.array(first, np.int64), own.astype(np.int64)]))
        restored = Counts(bins.astype(np.int64), counts[:size].astype(np.int64))
        counts = counts[size:]
        kind = entry.pop("kind")
        entry[_KEYS[kind]] = restored
        yield name, Stats(**entry) if kind == "Stats" else Scatter(**entry)


def _held(entry: Mapping[str, Any]) -> list[int]:
    """The first bin, where there is one, and how many are filled."""
    held: list[int] = entry[_KEYS[entry["kind"]]]
    return held


def _narrow(values: NDArray[np.int64]) -> NDArray[Any]:
    """The same numbers from 0 on in as few bytes as the largest needs, little-endian."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))).newbyteorder("<"))
