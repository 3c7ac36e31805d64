"""Sums of blocks of ground: what a block bootstrap draws from, without reading pixels again.

Neighbouring pixels err together, blocks of ground hardly do. Blocks lie on the whole grid, so a
block that shards cut is put together again, and no cut shows. They can be joined to larger ones
later: how far errors go together is only known when all is summed up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight.counts import Counts, bin_numbers, pair, paired, unpaired
from aeheight.metrics import BIN
from aeheight.windows import Region

MOST: Final = 4096
"""Blocks that are kept apart: of more, two by two are joined to one, and so on."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Sums of the errors d = predicted - reference in each block; ``+`` merges two of them."""

    keys: NDArray[np.int64]
    """(b, 3) number of the grid, row and column of a block, in blocks; ascending."""

    moments: NDArray[np.float64]
    """(b, 5) pixels, Σd (m), Σd² (m²), mean of the reference (m), Σ(reference - mean)² (m²)."""

    terms: NDArray[np.float64]
    """(b, k) other sums over the pixels of a block, which simply add."""

    cells: Counts
    """Pixels by block and d: place of the block in `keys`, `paired` with the bin of BIN metres."""

    scale: int = 1
    """Edges of the blocks that were summed, in the edge of these."""

    @classmethod
    def of(
        cls,
        place: tuple[int, Region, int],
        errors: NDArray[np.floating],
        reference: NDArray[np.floating],
        judged: NDArray[np.bool_],
        terms: Iterable[NDArray[np.float64]] = (),
    ) -> "Blocks":
        """Sum up one piece of ground; of too many blocks, whole ones are joined.

        Args:
            place: number of the grid, the piece, edge of a block in pixels.
            errors: (rows, columns) d, metres.
            reference: (rows, columns) metres.
            judged: (rows, columns) pixels that count: errors and reference are finite there.
            terms: of each (n,), finite, of the pixels that count, row by row.
        """
        number, region, edge = place
        scale = 1
        while len((found := _owners(region, edge * scale, judged))[0]) > MOST:
            scale *= 2
        (places, block) = found
        keys = np.insert(places, 0, number, axis=1)
        d, r = errors[judged].astype(np.float64), reference[judged].astype(np.float64)

        def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.bincount(block, values, minlength=len(keys)).astype(np.float64)

        n = np.bincount(block, minlength=len(keys)).astype(np.float64)
        first = float(r[0]) if r.size else 0.0
        mean = first + total(r - first) / np.maximum(n, 1)
        moments = np.stack([n, total(d), total(d * d), mean, total((r - mean[block]) ** 2)], axis=1)
        sums = [total(term) for term in terms]
        return cls(
            keys,
            moments,
            np.stack(sums, axis=1) if sums else np.empty((len(keys), 0)),
            paired(block, bin_numbers(d / BIN + 0.5)),
            scale,
        )

    @property
    def owners(self) -> NDArray[np.int64]:
        """(c,) place in `keys` of each cell."""
        return unpaired(self.cells.bins)[0]

    @property
    def bins(self) -> NDArray[np.int64]:
        """(c,) bin of d of each cell."""
        return unpaired(self.cells.bins)[1]

    def __add__(self, other: "Blocks") -> "Blocks":
        scale = max(self.scale, other.scale)
        parts = [part.joined(scale // part.scale) for part in (self, other)]
        total = _merged(parts, scale)
        while len(total.keys) > MOST:
            total = total.joined(2)
        return total

    def joined(self, factor: int) -> "Blocks":
        """The same ground in blocks whose edge is `factor` times as long."""
        if factor == 1:
            return self
        keys = self.keys // np.array([1, factor, factor])
        part = Blocks(keys, self.moments, self.terms, self.cells, self.scale)
        return _merged([part], self.scale * factor)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes."""
        return {
            "scale": np.array(self.scale),
            "keys": self.keys,
            "moments": self.moments,
            "terms": self.terms,
            "bins": self.cells.bins,
            "counts": self.cells.counts,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> "Blocks":
        """What `arrays` made."""
        cells = Counts(arrays["bins"], arrays["counts"])
        scale = int(arrays["scale"])
        return cls(arrays["keys"], arrays["moments"], arrays["terms"], cells, scale)


class Gathered:
    """Blocks of many pieces: added up as a balanced tree, so that work does not grow as n²."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Blocks]] = []

    def add(self, part: Blocks) -> None:
        """Take another piece."""
        level = 0
        while self._held and self._held[-1][0] == level:
            part = self._held.pop()[1] + part
            level += 1
        self._held.append((level, part))

    def total(self) -> Blocks | None:
        """All pieces; None where there are none."""
        total = None
        for _, part in reversed(self._held):
            total = part if total is None else part + total
        return total


def _owners(
    region: Region, edge: int, judged: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns (b, 2) of the blocks that have pixels; the place of each pixel's (n,)."""
    rows = np.arange(region.row, region.bottom) // edge
    cols = np.arange(region.col, region.right) // edge
    across = int(cols[-1] - cols[0]) + 1
    block = ((rows - rows[0])[:, None] * across + (cols - cols[0]))[judged]
    found = np.flatnonzero(np.bincount(block))
    corners = np.stack([rows[0] + found // across, cols[0] + found % across], axis=1)
    return corners.astype(np.int64), np.searchsorted(found, block)


def _merged(parts: Sequence[Blocks], scale: int) -> Blocks:
    """Blocks of parts, those of equal keys merged (Chan et al. 1983 for the moments)."""
    keys, place = np.unique(
        np.concatenate([part.keys for part in parts]), axis=0, return_inverse=True
    )
    place = place.reshape(-1)
    old = np.concatenate([part.moments for part in parts])

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(place, values, minlength=len(keys)).astype(np.float64)

    n = total(old[:, 0])
    base = float(old[0, 3]) if len(old) else 0.0
    mean = base + total(old[:, 0] * (old[:, 3] - base)) / np.maximum(n, 1)
    between = total(old[:, 0] * (old[:, 3] - mean[place]) ** 2)
    moments = [n, total(old[:, 1]), total(old[:, 2]), mean, total(old[:, 4]) + between]
    terms = np.concatenate([part.terms for part in parts])
    starts = np.cumsum([0] + [len(part.keys) for part in parts[:-1]])
    cells = [
        pair(place[start + part.owners], part.bins)
        for start, part in zip(starts, parts, strict=True)
    ]
    return Blocks(
        keys,
        np.stack(moments, axis=1),
        np.stack([total(column) for column in terms.T], axis=1)
        if terms.shape[1]
        else np.empty((len(keys), 0)),
        Counts.summed(np.concatenate(cells), np.concatenate([p.cells.counts for p in parts])),
        scale,
    )
