"""Named sums: tables of them merge name by name, and travel as compact bytes."""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Final

import numpy as np

from aeheight.counts import Counts
from aeheight.errors import InputError
from aeheight.metrics import Scatter, Stats

FORMAT: Final = "aeheight-sums"
FORMAT_VERSION: Final = 2

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
    """Named sums as compact bytes; the same sums give the same bytes, in any order of names."""
    sums = {name: _plain(part) for name, part in table.items()}
    document = {"format": FORMAT, "version": FORMAT_VERSION, "sums": sums}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return zlib.compress(text.encode(), 1)


def load(data: bytes) -> dict[str, Stats | Scatter]:
    """Read what :func:`dump` wrote, bit for bit.

    Raises:
        InputError: the bytes are damaged, something else, or of another format version.
    """
    try:
        document = json.loads(zlib.decompress(data))
        found = document["format"], document["version"]
        if found == (FORMAT, FORMAT_VERSION):
            return {name: _restored(entry) for name, entry in document["sums"].items()}
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


def _plain(part: Stats | Scatter) -> dict[str, Any]:
    """Sums as JSON can hold them; bins as steps from the last, which are short and much alike."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    for name, value in values.items():
        if isinstance(value, Counts):
            steps = np.diff(value.bins, prepend=0).tolist()
            values[name] = {"steps": steps, "counts": value.counts.tolist()}
    return {"kind": type(part).__name__} | values


def _restored(entry: dict[str, Any]) -> Stats | Scatter:
    """The sums behind one entry of a dumped document."""
    kind = entry.pop("kind")
    key = {"Stats": "histogram", "Scatter": "cells"}[kind]
    steps, counts = (np.array(entry[key][part], np.int64) for part in ("steps", "counts"))
    entry[key] = Counts(np.cumsum(steps), counts)
    return Stats(**entry) if kind == "Stats" else Scatter(**entry)
