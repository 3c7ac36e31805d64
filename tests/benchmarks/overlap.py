"""Beside `dask.array.map_overlap`: the same work, with a model that costs next to nothing.

    python -m tests.benchmarks.overlap [--edge 4096] [--block 2048] [--workers 4] [--rounds 3]

A pixel of the result is the 5 x 5 mean of the first band and the sum over all bands, which needs
2 px of the neighbours; both give the same bits. `map_overlap` takes the cube as Zarr gives it, one
block a task, and stores by `to_zarr`, as an expert would write it. Ours are tasks of `run_shards`
through `predict_region`, with windows that keep `--core` px, and the tree's own writing. In turns,
each on a cluster of its own of as many processes, whose start is left out; ours also on workers as
its command starts them: of two threads, with other settings of the C library's memory. A worker's
memory is its high water; bytes between workers are as Dask counts them. The aim: at least twice as
fast, with a quarter of the worker's memory.
"""

import argparse
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import dask.array as da
import numpy as np
import yaml
import zarr
from dask.base import optimize
from distributed import LocalCluster
from numpy.typing import NDArray

from aeheight.cluster import Client, Connection, Progress, run_shards
from aeheight.cube import Tree, create, open_tree
from aeheight.embeddings import NODATA
from aeheight.grid import Grid
from aeheight.inference import predict_region
from aeheight.receipts import Receipt, receipt_for
from aeheight.settings import load_region
from aeheight.sources import EmbeddingSource, Ground, Sources
from aeheight.steps import ingest
from aeheight.steps.run import ASKED, Run, cube_settings, sources_asked
from aeheight.store import Store
from aeheight.template import Layer, Shard
from aeheight.windows import Lattice, whole
from tests.benchmarks import TILE, machine, markdown, mirrored, real_codes

REACH = 2
"""Pixels of the neighbours that the model sees."""
THEIRS, OURS = "map_overlap", "aeheight"
HEAD = (
    *(
        "way, threads a worker",
        "wall s",
        "CPU s",
        "tasks",
        "MB between workers",
        "worker's peak MB",
    ),
    *("of which at start", "times as fast", "share of the memory"),
)


@dataclass(frozen=True)
class Took:
    """What one run cost."""

    wall: float
    cpu: float
    """Seconds of all workers."""
    tasks: int
    moved: float
    """MB between workers."""
    peak: float
    """MB of the largest worker."""
    start: float
    """MB of the largest worker before its first task."""


def main() -> None:
    """Measure and print."""
    options = _options()
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}", flush=True)
    with TemporaryDirectory() as folder:
        work, block = Path(folder), options.block
        codes = mirrored(real_codes(options.tile), options.shard)
        board = (options.edge // options.shard,) * 2
        write_cube(work, codes, board, options.shard)
        cube = open_tree(Store.at(work / "run" / "cube.zarr"))
        print(f"{options.edge} px, {options.edge**2 * 64 / 1e9:.2f} GB raw; shards of the cube "
              f"{options.shard} px, of the result {block} px", flush=True)  # fmt: skip
        rounds = [measured(cube, work, options) for _ in range(options.rounds)]
        same(work)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n")
    print(table(rounds))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tile", type=Path, default=TILE, help="a real tile to mirror")
    parser.add_argument("--edge", type=int, default=4096, help="of the cube; in facts: 8192")
    parser.add_argument("--block", type=int, default=2048, help="a task's pixels")
    parser.add_argument("--shard", type=int, default=1024, help="of the cube")
    parser.add_argument("--core", type=int, default=256, help="pixels that a window of ours keeps")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def model(codes: NDArray[np.int8]) -> NDArray[np.float32]:
    """(64, h, w) codes to (h - 4, w - 4)."""
    first = codes[0].astype(np.float32)
    size = 2 * REACH + 1
    rows = sum(first[k : len(first) - size + 1 + k] for k in range(size))
    box = sum(rows[:, k : rows.shape[1] - size + 1 + k] for k in range(size))
    middle = codes[:, REACH:-REACH, REACH:-REACH]
    found: NDArray[np.float32] = box / np.float32(size**2) + middle.sum(axis=0, dtype=np.int16)
    return found


def measured(cube: Tree, work: Path, options: argparse.Namespace) -> dict[str, Took]:
    """One round of everything, so that what else runs on the machine disturbs all alike."""
    found: dict[str, Took] = {}
    for threads in (1, 2):
        for name, way in ((f"{THEIRS}, {threads}", theirs), (f"{OURS}, {threads}", ours)):
            with (
                LocalCluster(
                    options.workers, threads_per_worker=threads, dashboard_address=None
                ) as cluster,
                Client(cluster) as client,
            ):
                found[name] = took(client, way(client, cube, work, options))
    with Connection(workers=options.workers, gpus=0) as connection:
        client = connection.client()
        found[f"{OURS}, as its command starts workers"] = took(
            client, ours(client, cube, work, options)
        )
    return found


def theirs(_: Client, cube: Tree, work: Path, options: argparse.Namespace) -> Callable[[], int]:
    """As an expert would write it."""
    source: Any = zarr.open_group(cube.store.uri, mode="r")[
        f"{cube.template.grids[0].name}/embedding"
    ]
    block = options.block
    codes = da.from_zarr(source, chunks=(1, source.shape[1], block, block))[0]
    heights = codes.map_overlap(
        _block, depth={0: 0, 1: REACH, 2: REACH}, boundary=NODATA, drop_axis=0, dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
    )  # fmt: skip
    target = zarr.create_array(work / "theirs.zarr", shape=source.shape[2:], dtype="float32",
                               chunks=(block, block), overwrite=True)  # fmt: skip
    return lambda: _stored(heights, target)


def _stored(heights: Any, target: Any) -> int:
    """Computes it; the number of tasks."""
    storing = da.to_zarr(heights, target, compute=False)
    (optimised,) = optimize(storing)
    storing.compute()
    return len(optimised.dask)


def _block(codes: NDArray[np.int8]) -> NDArray[np.float32]:
    return np.pad(model(codes), REACH)  # map_overlap trims it again


def ours(client: Client, cube: Tree, work: Path, options: argparse.Namespace) -> Callable[[], int]:
    """The same by tasks that read for themselves."""
    layer = Layer("height", "float32", np.nan, timed=True)
    cut = cube.template.cut.model_copy(update={"shard": options.block})
    made = replace(cube.template, layers=(layer,), cut=cut)
    heights = create(Store.at(work / "ours.zarr"), made)
    task, shards = Task(cube.store.uri, heights.store.uri, options.core), made.shards("height")

    def run() -> int:
        progress = Progress("overlap", len(shards), stream=io.StringIO())
        outcome = run_shards(client, task, shards, progress)
        if outcome.failed:
            raise RuntimeError(next(iter(outcome.failed.values())))
        return outcome.done

    return run


@dataclass(frozen=True)
class Task:
    """Makes one shard."""

    cube: str
    heights: str
    core: int

    def __call__(self, shard: Shard) -> Receipt:
        """Read, compute, write."""
        cube, heights = _opened(self.cube), _opened(self.heights)
        lattice = Lattice(cube.template.grids[0].shape, self.core + 2 * REACH, REACH)
        values = predict_region(
            lambda codes, _prior, _halo: Done(codes), lattice, shard.region, 1,
            lambda seen: cube.read(shard.group, "embedding", shard.year, seen),
        )  # fmt: skip
        digest = heights.write(shard, values[0])
        return Receipt(shard.name, digest, shard.region.size, 0, None, None, None, "", 0.0)


@dataclass(frozen=True)
class Done:
    """A batch that the model has yet to see."""

    codes: NDArray[np.int8]

    def result(self) -> NDArray[np.float32]:
        """(1, batch, k, k)."""
        return np.stack([model(part) for part in self.codes])[None]


@lru_cache(maxsize=2)
def _opened(uri: str) -> Tree:
    return open_tree(Store(uri))


def took(client: Client, run: Callable[[], int]) -> Took:
    start = max(client.run(high_water).values()) / 1e6
    cpu, wall = sum(client.run(time.process_time).values()), time.monotonic()
    tasks = run()
    wall, cpu = time.monotonic() - wall, sum(client.run(time.process_time).values()) - cpu
    moved = sum(client.run(_moved).values()) / 1e6
    peak = max(client.run(high_water).values()) / 1e6
    return Took(wall, cpu, tasks, moved, peak, start)


def _moved(dask_worker: Any) -> int:
    return int(dask_worker.transfer_outgoing_bytes_total)


def same(work: Path) -> None:
    """Exits unless both gave the same bits."""
    heights = open_tree(Store.at(work / "ours.zarr"))
    grid = heights.template.grids[0]
    mine = heights.read(grid.name, "height", heights.template.years[0], whole(grid.shape))
    other: Any = zarr.open_array(work / "theirs.zarr", mode="r")[:]
    np.testing.assert_array_equal(mine, other)


def table(rounds: list[dict[str, Took]]) -> str:
    """Medians of the rounds; ratios to `map_overlap` of as many threads, within each round."""
    lines = []
    for name, first in rounds[0].items():
        peer = f"{THEIRS}, {1 if name.endswith('1') else 2}"
        runs = [(one[name], one[peer]) for one in rounds]
        wall, cpu = (float(median(getattr(run, key) for run, _ in runs)) for key in ("wall", "cpu"))
        rest = [max(getattr(run, key) for run, _ in runs) for key in ("moved", "peak", "start")]
        fast = median(other.wall / run.wall for run, other in runs)
        less = median(run.peak / other.peak for run, other in runs)
        lines.append([name, wall, cpu, first.tasks, *rest, fast, less])
    return markdown(HEAD, lines)


def bare_cube(
    folder: Path, shape: tuple[int, int], shard: int, *, chunk: int = 256, **predict: Any
) -> Path:
    """A region file whose cube has no pixel and no receipt yet.

    Args:
        folder: for the region file and the run's store.
        shape: rows and columns.
        shard: of the cube.
        chunk: of the cube.
        predict: settings of the step.
    """
    west, north = 400_000, 5_200_000
    bounds = [west, north - 10 * shape[0], west + 10 * shape[1], north]
    settings = {
        "name": "benchmark",
        "store": str(folder / "run"),
        "grid": {"crs": "EPSG:32631", "resolution": 10, "bounds": bounds},
        "embeddings": {"source": "cog", "href": "made-up.tif", "year": 2021},
        "cube": {"shard": shard, "chunk": chunk},
        "predict": predict,
    }
    region = folder / "region.yaml"
    region.write_text(yaml.safe_dump(settings))
    run = Run(load_region(region, []))
    grid = Grid("EPSG:32631", 10.0, float(west), float(north), shape)
    ground = Ground(grid, None, EmbeddingSource(()), None, None)
    tree = create(run.cube, ingest.template(run.settings, Sources((ground,))))
    ledger = run.ledger("cube").begin(
        cube_settings(run.settings) | {"cube_identity": tree.identity}
    )
    ledger.store.write(ASKED, json.dumps(sources_asked(run.settings)).encode())
    return region


def write_cube(
    folder: Path, codes: NDArray[np.int8], board: tuple[int, int], shard: int, **predict: Any
) -> Path:
    """A region file with a whole cube of so many shards down and across: codes mirrored.

    Args:
        folder: for the region file and the run's store.
        codes: (64, `shard`, `shard`).
        board: shards down and across.
        shard: edge in pixels.
        predict: settings of the step.
    """
    rows, cols = (count * shard for count in board)
    region = bare_cube(folder, (rows, cols), shard, **predict)
    run = Run(load_region(region, []))
    tree, ledger = run.open_cube(), run.ledger("cube").current()
    first: dict[tuple[int, int], Receipt] = {}
    for place in tree.template.shards("embedding"):
        turn = place.region.row // shard % 2, place.region.col // shard % 2
        if turn not in first:
            turned = np.ascontiguousarray(codes[:, :: 1 - 2 * turn[0], :: 1 - 2 * turn[1]])
            digest = tree.write(place, turned)
            known = (turned != -128).all(axis=0)
            first[turn] = receipt_for(place, turned, digest, known, ledger.key, time.monotonic())
        else:
            source = Path(tree.store.uri, tree.key(type(place).parse(first[turn].shard)))
            target = Path(tree.store.uri, tree.key(place))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(source)
        ledger.leave(replace(first[turn], shard=place.name))
    return region


def high_water() -> int:
    """Bytes: the most that this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    # Where a process begins as a copy of another, this begins with the other's.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
