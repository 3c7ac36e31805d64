"""Tile to cube: the command beside what its reading and its compressing cost alone.

    python -m tests.benchmarks.ingest [--tile PATH] [--edge 4096] [--workers N ...] [--shard PX ...]

Makes a tile in AlphaEarth's format (planar, blocks of 1024 px, ZSTD, bottom-up; without overviews)
from a real one, or from made-up codes where that is missing, and runs `aeheight ingest` on it as a
user does. The aim: its wall time is at most 1.25 x (CPU seconds of rasterio reading the tile + CPU
seconds of the codec compressing the same bytes) / cores, and a task's memory at most 3 x the raw
bytes of its shard. rioxarray to the same Zarr layout is the peer.

The step's wall time is as the command reports it, its workers being up; its CPU time is that of the
whole command less that of one on a tiny tile. On a busy machine trust the CPU time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import google_crc32c
import numpy as np
import psutil
import rasterio
import rioxarray
import yaml
import zarr
from affine import Affine
from numcodecs.blosc import Blosc
from numpy.typing import NDArray
from rasterio.windows import Window
from zarr.codecs import BloscCodec, Crc32cCodec

from aeheight.embeddings import BANDS, NODATA
from tests.benchmarks import TILE, cpu_seconds, machine, markdown, mirrored, real_codes

BLOCK = 1024
MARGIN = 1.25
AIM = "aim: 1.25 (a + b), over all cores"
SMALL = 64
"""Pixels: a tile that takes no memory to speak of."""


@dataclass(frozen=True)
class Took:
    """What a piece of work cost."""

    wall: float
    cpu: float


def main() -> None:
    """Measure and print."""
    options = _options()
    codes, origin = _codes(options.tile, options.edge)
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {origin}", flush=True)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        tile = write_tile(work / "tile.tif", codes)
        tiny = write_tile(work / "tiny.tif", codes[:, :SMALL, :SMALL])
        print(f"{options.edge} px, {codes.nbytes / 1e9:.2f} GB raw, "
              f"{tile.stat().st_size / 1e9:.2f} GB as a tile", flush=True)  # fmt: skip
        rounds = [_compare(work, tile, tiny, codes, options) for _ in range(options.repeats)]
        print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n")
        print(_table([row for rows in rounds for row in rows], codes.nbytes), end="\n\n")
        head = ["shard", "raw MB", "peak of a task MB", "peak / raw", "aim"]
        print(markdown(head, [_memory(work, codes, shard) for shard in options.shard]))


def _options() -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tile", type=Path, default=TILE, help="a real tile to mirror")
    parser.add_argument("--edge", type=int, default=4096, help="of the tile made; real: 8192")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({cores // 2 or 1, cores}))
    parser.add_argument("--shard", type=int, nargs="+", default=[1024, 2048])
    return parser.parse_args()


def _codes(tile: Path, edge: int) -> tuple[NDArray[np.int8], str]:
    """(64, edge, edge), and where they come from."""
    if tile.exists():
        return mirrored(real_codes(tile), edge), "real codes, mirrored"
    rng = np.random.default_rng(0)
    # SD between bands, over ground and between neighbours as in real codes.
    made_up = np.empty((BANDS, BLOCK, BLOCK), dtype=np.int8)
    for band in made_up:
        ground = rng.normal(rng.normal(0, 29), 26, (BLOCK // 8, BLOCK // 8))
        near = ground.repeat(8, axis=0).repeat(8, axis=1) + rng.normal(0, 2, band.shape)
        band[...] = np.clip(np.rint(near), -127, 127)
    return mirrored(made_up, edge), "made-up codes (the real tile is missing)"


def write_tile(path: Path, codes: NDArray[np.int8]) -> Path:
    """A tile as AlphaEarth's are, without overviews."""
    block = max(min(BLOCK, codes.shape[1]) // 16 * 16, 16)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=BANDS,
        height=codes.shape[1],
        width=codes.shape[2],
        dtype="int8",
        nodata=NODATA,
        crs="EPSG:32616",
        transform=Affine(10, 0, 354020, 0, 10, 4900780),
        tiled=True,
        blockxsize=block,
        blockysize=block,
        interleave="band",
        compress="zstd",
        num_threads="all_cpus",
        bigtiff="if_safer",
    ) as target:
        target.write(codes)
    return path


Row = tuple[str, float, float]
"""Name, wall seconds, CPU seconds."""


def _compare(
    work: Path, tile: Path, tiny: Path, codes: NDArray[np.int8], options: argparse.Namespace
) -> list[Row]:
    """One round of everything, so that what else runs on the machine disturbs all alike."""
    shard = options.shard[0]
    _ingest(work / "first", tiny, shard, 1)
    read = _timed(partial(_read, tile))
    packed = _timed(partial(_compress, _codec(work / "first"), codes))
    aim = MARGIN * (read.cpu + packed.cpu)
    peer = _fresh(partial(_peer, tile, work / "peer.zarr", shard))
    rows: list[Row] = [
        ("a: rasterio reads, one thread", read.wall, read.cpu),
        ("b: codec compresses, one thread", packed.wall, packed.cpu),
        (AIM, aim / (os.cpu_count() or 1), aim),
        (f"rioxarray to Zarr, shard {shard}, Dask's threads", peer.wall, peer.cpu),
    ]
    for shard, workers in product(options.shard, options.workers):
        name = f"aeheight ingest, shard {shard}, {workers} workers"
        _, start = _ingest(work / "run", tiny, shard, workers)
        step, whole = _ingest(work / "run", tile, shard, workers)
        rows += [(name, step, whole.cpu - start.cpu)]
        rows += [(f"{name}, with their start", whole.wall, whole.cpu)]
    return rows


def _timed(work: Callable[[], object]) -> Took:
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return Took(time.perf_counter() - wall, cpu_seconds() - cpu)


def _fresh(work: Callable[[], object]) -> Took:
    """In a process of its own, once that is up: memory that is used again costs less."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_timed, work).result()


def _read(tile: Path) -> None:
    """Every block once, in the order of the file."""
    with rasterio.open(tile) as source:
        for band in source.indexes:
            for row, col in product(range(0, source.height, BLOCK), range(0, source.width, BLOCK)):
                source.read(band, window=Window(col, row, BLOCK, BLOCK))


def _codec(store: Path) -> Blosc:
    """The codec that the cube was made with."""
    array = _embedding(store)
    codec: Any = array.compressors[0]
    shuffles = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
    return Blosc(codec.cname.value, codec.clevel, shuffles[codec.shuffle.value])


def _embedding(store: Path) -> Any:
    root = zarr.open_group(store / "cube.zarr", mode="r")
    return next(group for _, group in root.groups())["embedding"]


def _compress(codec: Blosc, codes: NDArray[np.int8], chunk: int = 256) -> None:
    """Chunk by chunk, with the CRC-32C of each."""
    for row, col in product(range(0, codes.shape[1], chunk), repeat=2):
        part = np.ascontiguousarray(codes[:, row : row + chunk, col : col + chunk])
        google_crc32c.value(codec.encode(part))


def _ingest(store: Path, tile: Path, shard: int, workers: int) -> tuple[float, Took]:
    """Wall seconds of the step once its workers are up, and the whole command."""
    region = _region(store, tile, shard)
    command = _command(region, workers)
    wall, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = Took(time.perf_counter() - wall, cpu_seconds() - cpu)
    return float(_last(done.stdout, done.stderr)["seconds"]), took


def _region(store: Path, tile: Path, shard: int) -> Path:
    region = store.with_suffix(".yaml")
    settings = {
        "name": "benchmark",
        "store": str(store),
        "embeddings": {"source": "cog", "href": str(tile), "year": 2024},
        "cube": {"shard": shard},
    }
    region.write_text(yaml.safe_dump(settings))
    return region


def _command(region: Path, workers: int) -> list[str]:
    verb = [sys.executable, "-m", "aeheight.cli", "ingest", str(region), "--overwrite", "--json"]
    return [*verb, "--workers", str(workers)]


def _last(out: str, err: str) -> dict[str, Any]:
    """The summary that the command prints as JSON."""
    try:
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        sys.exit(f"aeheight ingest failed:\n{out}{err}")
    if found.get("failed"):
        sys.exit(f"shards failed: {found['failed']}")
    return found


def _peer(tile: Path, target: Path, shard: int) -> None:
    """Plain rioxarray to the same layout, on Dask's threads."""
    cut = {"band": BANDS, "y": shard, "x": shard}
    array: Any = rioxarray.open_rasterio(tile, chunks=cut, lock=False)
    north_up = array.isel(y=slice(None, None, -1)).drop_vars("spatial_ref")
    encoding = {
        "chunks": (BANDS, 256, 256),
        "shards": (BANDS, shard, shard),
        "compressors": [
            BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=1),
            Crc32cCodec(),
        ],
    }
    north_up.to_dataset(name="embedding").to_zarr(
        target, mode="w", zarr_format=3, consolidated=False, encoding={"embedding": encoding}
    )


def _table(rows: Sequence[Row], size: int) -> str:
    """Medians of the rounds; what is over the aim is taken within each round."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for name, wall, cpu in rows:
        seen.setdefault(name, []).append((wall, cpu))
    lines = []
    for name, times in seen.items():
        wall, cpu = np.median(times, axis=0)
        over = np.median(np.divide(times, seen[AIM]), axis=0)
        lines.append([name, float(wall), float(cpu), float(cpu / size * 1e9), *map(float, over)])
    return markdown(["", "wall s", "CPU s", "CPU s/GB raw", "wall / aim", "CPU / aim"], lines)


def _memory(
    work: Path, codes: NDArray[np.int8], shard: int
) -> tuple[int, float, float, float, float]:
    """The high water of a worker over four shards, less that of one that does almost nothing."""
    peaks = []
    for edge in (SMALL, 2 * shard):
        tile = write_tile(work / "memory.tif", codes[:, :edge, :edge])
        peaks.append(_high_water(_command(_region(work / "memory", tile, shard), 1)))
    raw, peak = BANDS * shard**2 / 1e6, (peaks[1] - peaks[0]) / 1e6
    return shard, raw, peak, peak / raw, 3.0


def _high_water(command: list[str]) -> int:
    """Bytes: the most that the largest child of a command ever held."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            try:
                workers = psutil.Process(driver.pid).children(recursive=True)
                most = max([most, *map(_peak, workers)])
            except psutil.Error:
                continue
            time.sleep(0.005)
    return most


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    try:
        text = status.read_text()
    except OSError:  # no Linux, or it just ended
        return int(process.memory_info().rss)
    words = text.partition("VmHWM:")[2].split()
    return int(words[0]) * 1024 if words else 0


if __name__ == "__main__":
    main()
