"""Programs that measure; `RESULTS.md` keeps what they said. No part of the test suite.

Run from the project's root: `python -m tests.benchmarks.layout`, `.ingest`, `.planning`.
"""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from aeheight.embeddings import NODATA

DATA = Path(__file__).parents[3] / "shared" / "data"
TILE = DATA / "wisconsin_10m" / "aef_format_bottomup_1024px.tif"


def machine() -> str:
    """The processor in words, such as `AMD EPYC, 4 cores, Python 3.11`."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all its threads, and of its children that ended."""
    return sum(os.times()[:4])


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats with three figures."""
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = [" | ".join(line) for line in [head, ["---"] * len(head), *cells]]
    return "\n".join(f"| {line} |" for line in lines)


def real_codes(path: Path) -> NDArray[np.int8]:
    """The codes of a tile, (64, rows, columns), in the order of the file.

    Exits with a message where the file is missing.
    """
    if not path.exists():
        sys.exit(f"{path} is missing; name an AlphaEarth tile with --tile")
    with rasterio.open(path) as dataset:
        codes: NDArray[np.int8] = dataset.read()
    return codes


def mirrored(codes: NDArray[np.int8], edge: int) -> NDArray[np.int8]:
    """Codes over a square of `edge` px: mirrored again and again, which keeps their statistics."""
    rows, cols = (_folded(size, edge) for size in codes.shape[1:])
    out = np.empty((len(codes), edge, edge), dtype=np.int8)
    for band, source in zip(out, codes, strict=True):
        band[...] = source[np.ix_(rows, cols)]
    return out


def _folded(size: int, edge: int) -> NDArray[np.intp]:
    """Indices 0 1 2 2 1 0 0 1 ... of a line that is mirrored at its ends."""
    index = np.arange(edge) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def valid_share(codes: NDArray[np.int8]) -> float:
    """Share of the pixels that have an embedding."""
    return float((codes[0] != NODATA).mean())
