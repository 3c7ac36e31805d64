"""Evaluating a map beside reading what it is made from, on one process and on several.

    python -m tests.benchmarks.evaluate [--tile PATH] [--edge 4096] [--processes 1 2 4] [--rounds 3]
        [--kernel]

Real codes, mirrored to a square, and made-up heights lie in a cube and a map as `aeheight` writes
them, in shards of 1024 px. `read` only reads the arrays that a shard's report is made from;
`evaluate` is the task of `aeheight evaluate`: all statistics of the report, its baselines, sums
stored, receipt left; with `--kernel` a network's kernel regression too, on 30 % of the ground.
In turns, each on so many processes of one thread, after one shard each to warm up. What is read
lies in the page cache, so decoding is what is measured. The aims: at least half the speed of
reading, and at least 0.75 n times one process on n physical cores.
"""

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from aeheight.criteria import DISTANCES, NOVELTIES, REACH, ROUGHNESSES, SLOPES, Criterion
from aeheight.crossings import MARGIN
from aeheight.cube import Tree, create, open_tree
from aeheight.embeddings import BANDS
from aeheight.grid import Grid
from aeheight.kernel import Kernel
from aeheight.receipts import Ledger
from aeheight.relief import SECTORS
from aeheight.settings import CubeSettings, fingerprint
from aeheight.sources import ClassMaps
from aeheight.steps.evaluate import SumUp, round_edges
from aeheight.steps.parts import CLASSES
from aeheight.steps.predict import MODEL
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template
from tests.benchmarks import TILE, machine, markdown, mirrored, real_codes
from tests.checkpoints import checkpoint_of

YEAR, SHARD, BLOCK = 2021, 1024, 64
HEAD = ("work", "processes", "s", "Mpx/s", "times one process", "of reading")
LAYERS = (
    Layer("embedding", "int8", -128, timed=True, bands=tuple(f"A{k:02}" for k in range(BANDS))),
    Layer("height", "float32", np.nan),
    Layer("prior", "float32", np.nan),
    Layer("split", "uint8", 0),
)
MAPPED = tuple(Layer(n, "float32", np.nan, timed=True) for n in ("height", "novelty", "spread"))


@dataclass(frozen=True)
class Reading:
    """Reads what `SumUp` reads of a shard; travels like it."""

    cube: str
    heights: str

    def __call__(self, shard: Shard) -> None:
        """Read, and let go."""
        cube, heights = open_tree(Store(self.cube)), open_tree(Store(self.heights))
        cube.read(shard.group, "embedding", YEAR, shard.region)
        cube.read(shard.group, "prior", None, shard.region)
        cube.read(shard.group, "split", None, shard.region.expand(REACH))
        cube.read(shard.group, "height", None, shard.region.expand(MARGIN))
        heights.read(shard.group, "height", YEAR, shard.region.expand(MARGIN))
        for layer in ("novelty", "spread"):
            heights.read(shard.group, layer, YEAR, shard.region)


def main() -> None:
    """Measure and print."""
    options = _options()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    with TemporaryDirectory() as folder:
        codes = mirrored(real_codes(options.tile), options.edge)
        tasks, shards = write(Path(folder), codes, bends=options.kernel)
        took = dict(measured(tasks, shards, options.processes, options.rounds))
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}")
    print(f"{options.edge} px square, medians of {options.rounds}; kernel: {options.kernel}\n")
    least, pixels = options.processes[0], options.edge**2
    rows = [
        [name, count, seconds, pixels / seconds / 1e6, took[name, least] / seconds,
         took["read", count] / seconds]
        for (name, count), seconds in took.items()
    ]  # fmt: skip
    print(markdown(HEAD, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tile", type=Path, default=TILE, help="an AlphaEarth tile")
    parser.add_argument("--edge", type=int, default=4096, help="of the square, a multiple of 1024")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernel", action="store_true", help="judge a kernel regression too")
    return parser.parse_args()


def measured(
    tasks: dict[str, Callable[[Shard], object]], shards: list[Shard], counts: list[int], rounds: int
) -> Iterator[tuple[tuple[str, int], float]]:
    """Median seconds of each task on each number of processes."""
    context = multiprocessing.get_context("spawn")
    for count in counts:
        with ProcessPoolExecutor(count, context) as pool:
            for task in tasks.values():
                list(pool.map(task, shards[:1] * (4 * count)))
            seen = [{name: _seconds(pool, task, shards) for name, task in tasks.items()}
                    for _ in range(rounds)]  # fmt: skip
        for name in tasks:
            yield (name, count), median(took[name] for took in seen)


def _seconds(
    pool: ProcessPoolExecutor, task: Callable[[Shard], object], shards: list[Shard]
) -> float:
    start = time.perf_counter()
    list(pool.map(task, shards))
    return time.perf_counter() - start


def write(
    folder: Path, codes: NDArray[np.int8], *, bends: bool
) -> tuple[dict[str, Callable[[Shard], object]], list[Shard]]:
    """A cube and its map, and the tasks to be timed."""
    edge = codes.shape[1]
    grid = Grid("EPSG:32616", 10.0, 300_000.0, 4_900_000.0, (edge, edge))
    template = Template((grid,), LAYERS, (YEAR,), CubeSettings(shard=SHARD, chunk=256), "cube")
    cube = create(Store.at(str(folder / "cube.zarr")), template)
    heights = create(Store.at(str(folder / "heights.zarr")), replace(template, layers=MAPPED))
    layers = {"embedding": codes} | made_up(edge)
    for tree, prefix in ((cube, ""), (heights, "mapped ")):
        for layer in tree.template.layers:
            for shard in tree.template.shards(layer.name):
                tree.write(shard, layers[prefix + layer.name][..., *shard.region.slices])
    shards = [replace(shard, layer="report", year=YEAR) for shard in cube.template.shards("height")]
    reading = Reading(cube.store.uri, heights.store.uri)
    return {"read": reading, "evaluate": task(folder, cube, heights, codes, bends=bends)}, shards


def task(folder: Path, cube: Tree, heights: Tree, codes: NDArray[np.int8], *, bends: bool) -> SumUp:
    """As `aeheight evaluate` makes it."""
    checkpoint = checkpoint_of()
    if bends:
        centres = np.ascontiguousarray(codes[:, :: codes.shape[1] // 32, :: codes.shape[1] // 16])
        centres = centres.reshape(BANDS, -1)[:, :512].T
        bumps = Kernel(checkpoint.ridge, np.ascontiguousarray(centres), np.ones(512, np.float32))
        checkpoint = replace(checkpoint, kernel=bumps)
    maps, ledger = Store.at(str(folder / "maps")), Ledger(Store.at(str(folder / "report")))
    maps.write(MODEL, checkpoint.to_bytes())
    ledger = ledger.begin({"benchmark": True})
    named = ClassMaps({}).to_bytes()
    ledger.store.write(CLASSES, named)
    edges = round_edges(0, 500)
    criteria = {
        "slope": Criterion(SLOPES),
        "height": Criterion(edges),
        "predicted": Criterion((-math.inf, *edges, math.inf)),
        "aspect": Criterion(names=dict(enumerate(SECTORS))),
        "roughness": Criterion(ROUGHNESSES),
        "distance": Criterion(DISTANCES),
        "novelty": Criterion(NOVELTIES),
    }
    return SumUp(
        cube.store.uri, heights.store.uri, heights.identity, "", maps.uri, ledger.store.uri,
        ledger.key, fingerprint(named.decode()), tuple(criteria.items()), BLOCK,
        (("shards", SHARD), ("windows", SHARD)),
    )  # fmt: skip


def made_up(edge: int) -> dict[str, NDArray[np.generic]]:
    """Hills with trees on them, a map that errs, and blocks: 20 % test, 10 % validate."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:edge, :edge].astype(np.float32)
    hills = 250 + 120 * np.sin(x / 170) * np.cos(y / 230) + 40 * np.sin((x + 2 * y) / 37)
    height = (hills + 12 * rng.random((edge, edge), np.float32)).astype(np.float32)
    blocks = rng.choice([1, 2, 3], (edge // BLOCK, edge // BLOCK), p=[0.7, 0.1, 0.2])
    error = 6 * rng.standard_normal((edge, edge), np.float32)
    return {
        "height": height,
        "prior": hills.astype(np.float32),
        "split": np.kron(blocks, np.ones((BLOCK, BLOCK))).astype(np.uint8),
        "mapped height": height + error,
        "mapped novelty": rng.random((edge, edge), np.float32),
        "mapped spread": 5 + 10 * rng.random((edge, edge), np.float32),
    }


if __name__ == "__main__":
    main()
