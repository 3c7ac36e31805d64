"""What codec, chunk and shard cost: size, writing, scans, random patches, haloed windows.

    python -m tests.benchmarks.layout [--tile PATH] [--edge 4096] [--repeats 3] [--full]

Real codes, mirrored to a square that holds the largest shard, go through zarr-python and the
project's own store; every chunk carries a CRC-32C as in the cube. CPU seconds are of the whole
process (a shared machine disturbs them less than wall time), GB and MB are of raw bytes. What is
read lies in the page cache, so decoding is what is measured. Layouts are written and read in turn,
again and again, and the medians are printed: trust the ratios.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from aeheight.embeddings import NODATA
from aeheight.store import Store
from tests.benchmarks import TILE, cpu_seconds, machine, markdown, mirrored, real_codes

CODECS: dict[str, Callable[[], Any]] = {
    "blosc-zstd 1 bitshuffle": lambda: _blosc("zstd", 1),
    "blosc-zstd 3 bitshuffle": lambda: _blosc("zstd", 3),
    "blosc-zstd 5 bitshuffle": lambda: _blosc("zstd", 5),
    "zstd 3": lambda: ZstdCodec(level=3),
    "blosc-lz4 bitshuffle": lambda: _blosc("lz4", 5),
}
CHOSEN = "blosc-zstd 3 bitshuffle"
CHUNKS = (128, 256)
SHARDS = (None, 1024, 2048, 4096)
STRIDE, HALO, PATCH = 1024, 64, 256
PIXELS = 1e8
"""Of 10 m, in 10,000 km²."""
FIGURES = ("ratio", "write", "scan", "patches", "windows")


@dataclass(frozen=True)
class Layout:
    """One way to cut and pack a cube."""

    codec: str
    chunk: int
    shard: int | None
    """None: every chunk is an object."""

    @property
    def objects(self) -> int:
        """In 10,000 km² of a year."""
        return round(PIXELS / (self.shard or self.chunk) ** 2)

    def create(self, folder: str, edge: int) -> Any:
        """An empty array (time, band, y, x), as the cube's."""
        cut = (1, 64, self.chunk, self.chunk)
        return zarr.create_array(
            Store.at(folder).zarr(),
            shape=(1, 64, edge, edge),
            chunks=cut,
            shards=None if self.shard is None else (1, 64, self.shard, self.shard),
            dtype="int8",
            fill_value=NODATA,
            compressors=[CODECS[self.codec](), Crc32cCodec()],
        )


def _blosc(name: Literal["zstd", "lz4"], level: int) -> BloscCodec:
    return BloscCodec(cname=name, clevel=level, shuffle="bitshuffle", typesize=1)


def layouts(edge: int, *, full: bool) -> list[Layout]:
    """Every cut with the chosen codec, every codec with one cut; or the full cross."""
    shards = [shard for shard in SHARDS if shard is None or shard <= edge]
    return [
        Layout(codec, chunk, shard)
        for codec, chunk, shard in product(CODECS, CHUNKS, shards)
        if full or codec == CHOSEN or shard == STRIDE
    ]


def main() -> None:
    """Measure and print."""
    options = _options()
    codes = mirrored(real_codes(options.tile), options.edge)
    chosen = layouts(options.edge, full=options.full)
    seen: dict[Layout, list[dict[str, float]]] = {layout: [] for layout in chosen}
    for _, layout in product(range(options.repeats), chosen):
        with TemporaryDirectory() as folder:
            seen[layout].append(measure(layout, codes, folder))
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; zarr {zarr.__version__}")
    print(f"{options.edge} px square of real codes, medians of {options.repeats}\n")
    print(table(seen))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tile", type=Path, default=TILE, help="an AlphaEarth tile")
    parser.add_argument("--edge", type=int, default=4096, help="of the square, a multiple of 1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="every codec with every cut")
    return parser.parse_args()


def measure(layout: Layout, codes: NDArray[np.int8], folder: str) -> dict[str, float]:
    """Write a cube, read it in three ways."""
    edge, gigabytes = codes.shape[-1], codes.nbytes / 1e9
    array = layout.create(folder, edge)
    figures = {"write": _cpu(lambda: _write(array, codes, layout.shard or STRIDE)) / gigabytes}
    stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    figures["ratio"] = codes.nbytes / stored
    scan, windows = list(_windows(edge, 0)), list(_windows(edge, HALO))
    figures["scan"] = _cpu(lambda: _read(array, scan)) / gigabytes
    patches = _patches(edge, 100)
    figures["patches"] = len(patches) / _cpu(lambda: _read(array, patches))
    size = 64 * sum((y.stop - y.start) * (x.stop - x.start) for y, x in windows)
    figures["windows"] = size / 1e6 / _cpu(lambda: _read(array, windows))
    return figures


def _write(array: Any, codes: NDArray[np.int8], step: int) -> None:
    """Piece by piece, as tasks do."""
    for row, col in product(range(0, codes.shape[-1], step), repeat=2):
        part = np.s_[:, row : row + step, col : col + step]
        array[(0, *part)] = codes[part]


Window = tuple[slice, slice]


def _windows(edge: int, halo: int) -> Iterator[Window]:
    """Windows of the prediction, cut off at the edge."""
    for row, col in product(range(0, edge, STRIDE), repeat=2):
        y, x = (slice(max(at - halo, 0), min(at + STRIDE + halo, edge)) for at in (row, col))
        yield y, x


def _patches(edge: int, count: int) -> list[Window]:
    """Training's: anywhere."""
    corners = np.random.default_rng(0).integers(0, edge - PATCH, (count, 2)).tolist()
    return [(slice(y, y + PATCH), slice(x, x + PATCH)) for y, x in corners]


def _read(array: Any, windows: list[Window]) -> None:
    for y, x in windows:
        array[0, :, y, x]


def _cpu(work: Callable[[], None]) -> float:
    before = cpu_seconds()
    work()
    return cpu_seconds() - before


def table(seen: dict[Layout, list[dict[str, float]]]) -> str:
    """Medians, one line a layout."""
    head = ["codec", "chunk", "shard", "ratio", "write CPU s/GB", "scan CPU s/GB"]
    head += ["256 px patches / CPU s", "1152 px windows MB / CPU s", "objects in 10,000 km²"]
    rows = [
        [layout.codec, layout.chunk, layout.shard or "none"]
        + [float(median(run[name] for run in runs)) for name in FIGURES]
        + [layout.objects]
        for layout, runs in seen.items()
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
