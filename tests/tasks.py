"""Tasks for the tests of the cluster: they note what they do, and die or hang when told."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster, get_worker

from aeheight.cluster import LIMIT, Device, Outcome, Progress, run_shards
from aeheight.receipts import Receipt
from aeheight.template import Shard
from aeheight.windows import tile

SHARDS = [Shard("utm10n", "height", 2021, region) for region in tile((24, 40), 8)]


@dataclass(frozen=True)
class Task:
    """Leaves a file when it begins and a file when it ends."""

    folder: Path
    seconds: float = 0.0
    failing: frozenset[str] = frozenset()
    dying: str = ""
    """The first attempt at this shard kills its worker."""
    deadly: str = ""
    """Every attempt at this shard kills its worker."""
    stopping: str = ""
    """The first attempt at this shard stops its worker: not even heartbeats go on."""
    hanging: str = ""
    """The first attempt at this shard never ends."""
    hopeless: str = ""
    """No attempt at this shard ever ends."""

    def __call__(self, shard: Shard) -> Receipt:
        begun = self._count(shard)
        key = json.dumps(get_worker().get_current_task())
        self._note(shard, "begin", f"{os.getpid()} {key}")
        if shard.name == self.deadly or (shard.name == self.dying and not begun):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.name == self.stopping and not begun:
            os.kill(os.getpid(), signal.SIGSTOP)
        if shard.name == self.hopeless or (shard.name == self.hanging and not begun):
            time.sleep(600)
        time.sleep(self.seconds)
        if shard.name in self.failing:
            raise ValueError(f"{shard.region.name} has no ground\nand a second line")
        self._note(shard, "end", "")
        return Receipt(shard.name, "d", shard.region.size, 0, None, None, None, "s", 0.0)

    def _count(self, shard: Shard) -> int:
        return len(list(self.folder.glob(f"{shard.region.name}.begin.*")))

    def _note(self, shard: Shard, what: str, text: str) -> None:
        path = self.folder / f"{shard.region.name}.{what}.{uuid.uuid4().hex}"
        path.write_text(text)


def notes(folder: Path, what: str) -> Counter[str]:
    return Counter(path.name.split(".")[0] for path in folder.glob(f"*.{what}.*"))


def names(shards: list[Shard]) -> list[str]:
    return [shard.region.name for shard in shards]


def run(
    client: Client,
    task: Callable[[Shard], Receipt],
    shards: list[Shard] = SHARDS,
    device: Device = "cpu",
    limit: float = LIMIT,
) -> tuple[Outcome, str]:
    stream = io.StringIO()
    progress = Progress("test", len(shards), stream=stream, interval=0)
    outcome = run_shards(client, task, shards, progress, device, limit=limit)
    return outcome, stream.getvalue()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@contextmanager
def scheduler_process(workers: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A scheduler with workers, in a process of its own."""
    code = f"""
import time
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster({workers}, threads_per_worker=1, processes=False, protocol="tcp://",
                      dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def local_scheduler(workers: int) -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        dashboard_address=":0",
    ) as cluster:
        yield cluster


@contextmanager
def worker_process(
    address: str, *arguments: str, python: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker without a nanny.

    Args:
        address: of the scheduler.
        arguments: of `dask worker`.
        python: a folder whose `sitecustomize.py` the process runs first.
    """
    words = [sys.executable, "-m", "dask", "worker", address, "--no-nanny", "--no-dashboard"]
    process = subprocess.Popen(
        [*words, "--nthreads", "1", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | ({"PYTHONPATH": str(python)} if python else {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
