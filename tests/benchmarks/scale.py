"""What a driver needs for very many shards: milliseconds a shard, and memory.

    python -m tests.benchmarks.scale [--shards 10000 ...] [--plan 1000000] [--workers N]

The cube has no embedding anywhere, so that no window is run: what is left is all that `aeheight
predict` does besides. Receipts are as large as life, one file a shard; those of the cube are made
up. `a task that does nothing` leaves out the workers' part too: no cube is opened, nothing written.
The last table plans many more shards: all to be done, then a map of which nine tenths are done.

Every row is a driver of its own, whose memory is its high water (with Dask's scheduler in it). Its
workers being up, `plan` and `execute` are called as the command calls them. The aims: 10 ms a
shard and 2 GB for 1,000,000 shards, and a worker's memory that does not grow with the region.
"""

import argparse
import io
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from aeheight.cluster import Client, Connection, Progress, run_shards
from aeheight.receipts import Ledger, Receipt
from aeheight.settings import load_region
from aeheight.steps import predict
from aeheight.steps.cover import settled, template
from aeheight.steps.run import Options, Run
from aeheight.steps.train import load_checkpoint
from aeheight.template import Shard
from tests.benchmarks import machine, markdown
from tests.benchmarks.overlap import bare_cube, high_water
from tests.checkpoints import checkpoint_of

EDGE = 16
"""Pixels: of a shard."""
MB = 1e6
HEAD = (
    *("work", "shards", "planning s", "driving s", "ms a shard", "driver CPU ms a shard"),
    *("driver peak MB", "worker MB before", "after"),
)


def main() -> None:
    """Measure and print."""
    options = _options()
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {options.workers} workers", flush=True)
    rows = []
    for count in options.shards:
        for work in (idle, step):
            with TemporaryDirectory() as folder:
                region = write_run(Path(folder), count)
                rows.append(_fresh(work, region, options.workers))
                print(f"{rows[-1][0]}: {rows[-1][1]} shards", flush=True)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n")
    print(markdown(HEAD, rows), end="\n\n")
    if options.plan:
        with TemporaryDirectory() as folder:
            region = write_run(Path(folder), options.plan)
            lines = [_fresh(planned, region, options.workers)]
            _pretend_done(region)
            lines.append(_fresh(planned, region, options.workers))
        head = ["shards", "pending", "plan s", "ms a shard", "driver peak MB"]
        print(markdown(head, lines))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--plan", type=int, default=100_000, help="shards; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def write_run(folder: Path, shards: int) -> Path:
    """A run whose cube is whole, and empty, with at least so many shards; its region file."""
    side = math.ceil(math.sqrt(shards)) * EDGE
    region = bare_cube(folder, (side, side), EDGE, chunk=EDGE, window=EDGE)
    run = Run(load_region(region, []), Options())
    pretend(run.ledger("cube"), run.open_cube().template.shards("embedding"))
    run.model.write("best.ckpt", checkpoint_of().to_bytes())
    return region


def pretend(ledger: Ledger, shards: Iterable[Shard]) -> None:
    """Receipts with nothing in them: what is done is told by their names alone."""
    root = Path(ledger.store.uri) / ledger.current().key
    there = set()
    for shard in shards:
        place = root / f"{shard.name}~{shard.inputs or '0123456789abcdef'}.json"
        if place.parent not in there:
            place.parent.mkdir(parents=True, exist_ok=True)
            there.add(place.parent)
        place.touch()


def _pretend_done(region: Path) -> None:
    """Receipts of nine tenths of the map, of inputs that are still true."""
    run = Run(load_region(region, []), Options())
    work = predict._Work.of(run)
    ledger = run.ledger("heights").begin(work.begun_with())
    pretend(ledger, (shard for n, shard in enumerate(work.shards(run)) if n % 10))


Row = tuple[Any, ...]


def _fresh(work: Callable[[Path, int], Row], region: Path, workers: int) -> Row:
    """A row from a driver of its own, which has its own high water."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, region, workers).result()


def idle(region: Path, workers: int) -> Row:
    """Dask and `run_shards` alone."""
    with Connection(workers=workers, gpus=0) as connection:
        client = connection.client()
        run = Run(load_region(region, []), Options(), connection)
        started = time.monotonic()
        shards = _map(run)
        planning = time.monotonic() - started
        client.run(memory)
        before, clock = max(client.run(memory).values()), Clock()
        progress = Progress("idle", len(shards), stream=io.StringIO())
        run_shards(client, nothing, shards, progress)
        return "a task that does nothing", *_row(len(shards), planning, clock, client, before)


def _map(run: Run) -> list[Shard]:
    cube, checkpoint = run.open_cube().template, load_checkpoint(run)
    settings = settled(run.settings.predict, checkpoint, cube)
    return template(cube, checkpoint, settings).shards("height")


def nothing(shard: Shard) -> Receipt:
    """A task."""
    return Receipt(shard.name, "", shard.region.size, 0, None, None, None, "", 0.0)


def step(region: Path, workers: int) -> Row:
    """The step, with its receipts."""
    with Connection(workers=workers, gpus=0) as connection:
        client = connection.client()
        run = Run(load_region(region, []), Options(as_json=True), connection)
        started = time.monotonic()
        predict.plan(run)
        planning = time.monotonic() - started
        before, clock = max(client.run(memory).values()), Clock()
        outcome = predict.execute(run)
        if outcome.failed:
            raise RuntimeError(f"shards failed: {next(iter(outcome.failed.items()))}")
        return "the step", *_row(outcome.done, planning, clock, client, before)


def planned(region: Path, workers: int) -> Row:
    """`aeheight predict --plan`."""
    with Connection(workers=workers, gpus=0) as connection:
        connection.client()
        run = Run(load_region(region, []), Options(), connection)
        started = time.monotonic()
        facts = predict.plan(run).facts
        seconds = time.monotonic() - started
        shards = facts["shards"]
        return shards, facts["pending"], seconds, seconds / shards * 1e3, high_water() / MB


class Clock:
    """Wall and CPU seconds since it was made; of this process alone."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Wall, CPU."""
        return time.monotonic() - self._wall, time.process_time() - self._cpu


def _row(shards: int, planning: float, clock: Clock, client: Client, before: int) -> Row:
    wall, cpu = clock.read()
    after = max(client.run(memory).values())
    each = wall / shards * 1e3, cpu / shards * 1e3
    return shards, planning, wall, *each, high_water() / MB, before / MB, after / MB


def memory() -> int:
    """Bytes of the process."""
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
