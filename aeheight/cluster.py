"""Mapping a task over shards on Dask: bounded in flight, results released, failures listed.

A task carries only itself (a small frozen value) and a shard's name; it reads, computes, writes and
leaves its receipt on the worker, so that a driver may die at any time and lose nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, as_completed

from aeheight.cube import Shard
from aeheight.errors import InputError
from aeheight.receipts import Receipt

_AHEAD = 2
"""Tasks in flight for every thread of the cluster: enough that no worker ever waits."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Task = Callable[[Shard], Receipt]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step's shards."""

    done: int
    """Shards finished now."""
    skipped: int
    """Shards that had their receipt before."""
    failed: dict[str, str]
    """Name of every shard that failed, and why; the next run takes up just those."""
    seconds: float
    pixels: int
    """Pixels of the shards finished now."""


@contextmanager
def connect(scheduler: str | None = None, workers: int | None = None) -> Iterator[Client]:
    """A client of a given scheduler, or of worker processes on this machine.

    Args:
        scheduler: such as `tcp://host:8786`; None starts a cluster here.
        workers: processes here; None is one for every two cores. They share the cores evenly.

    Raises:
        InputError: no scheduler answers at that address, or no worker joins it.
    """
    if scheduler is None:
        count = workers or max(CPU_COUNT // 2, 1)
        threads = str(max(CPU_COUNT // count, 1))
        with (
            LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                dashboard_address=":0",
                env=dict.fromkeys(_THREAD_VARIABLES, threads),
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(scheduler, timeout=20)
    except OSError as error:
        raise InputError(f"no Dask scheduler answers at {scheduler}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=120)
        except TimeoutError as error:
            raise InputError(f"no worker joined {scheduler} within 120 s; start some") from error
        yield client


@dataclass(slots=True)
class Progress:
    """Shards done, failed and left, pixels a second, time to go: for people or as JSON lines."""

    label: str
    total: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    as_json: bool = False
    interval: float = 2.0
    done: int = 0
    failed: int = 0
    pixels: int = 0
    _started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0

    def step(self, pixels: int, *, failed: bool = False) -> None:
        """Count one shard, and show it if the last line is old enough or it is the last shard."""
        self.done += not failed
        self.failed += failed
        self.pixels += 0 if failed else pixels
        now = time.monotonic()
        if now - self._shown >= self.interval or self.done + self.failed == self.total:
            self._shown = now
            print(self.line(now - self._started), file=self.stream, flush=True)

    def line(self, seconds: float) -> str:
        """The state as text or JSON after so many seconds."""
        left = self.total - self.done - self.failed
        rate = self.pixels / max(seconds, 1e-9)
        to_go = left * seconds / max(self.done + self.failed, 1)
        if self.as_json:
            return json.dumps(
                {
                    "step": self.label,
                    "done": self.done,
                    "failed": self.failed,
                    "left": left,
                    "pixels_per_second": round(rate),
                    "seconds_to_go": round(to_go, 1),
                }
            )
        return (
            f"{self.label:9} {self.done:>5} of {self.total} shards done, {self.failed} failed, "
            f"{left} left   {rate / 1e6:.2f} Mpx/s   {_clock(to_go)} to go"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_shards(
    client: Client, task: Task, shards: Sequence[Shard], key: str, progress: Progress
) -> Outcome:
    """Run a task for every shard; each shard succeeds or fails on its own.

    Args:
        client: an open client.
        task: picklable and small; it writes the shard and leaves the receipt itself.
        shards: each by one task only.
        key: what makes the tasks' keys differ from another run's (a fingerprint of settings).
        progress: told of every shard.

    Raises:
        ConnectionError: the scheduler went away; what has a receipt is safe.
    """
    started = time.monotonic()
    waiting = iter(shards)
    names: dict[Any, Shard] = {}
    failed: dict[str, str] = {}
    pixels = 0
    resources = {"GPU": 1} if _has_gpus(client) else None

    def submit(shard: Shard) -> Any:
        future = client.submit(
            task, shard, key=f"{progress.label}-{key}-{shard.name}", pure=False, resources=resources
        )
        names[future.key] = shard
        return future

    running = as_completed(
        [submit(shard) for shard, _ in zip(waiting, _room(client), strict=False)]
    )
    for future in running:
        shard = names.pop(future.key)
        if future.status == "finished":
            pixels += shard.region.size
        elif future.status == "error":
            failed[shard.name] = _reason(future.exception())
        else:
            raise ConnectionError(
                f"the scheduler went away while {shard.name} was {future.status}; run again: "
                "finished shards are kept"
            )
        progress.step(shard.region.size, failed=future.status != "finished")
        future.release()
        if (following := next(waiting, None)) is not None:
            running.add(submit(following))
    done = len(shards) - len(failed)
    return Outcome(done, 0, failed, time.monotonic() - started, pixels)


def _room(client: Client) -> range:
    threads = sum(client.nthreads().values())
    return range(max(threads, 1) * _AHEAD)


def _has_gpus(client: Client) -> bool:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any("GPU" in worker["resources"] for worker in workers)


def _reason(error: BaseException) -> str:
    """One line of what went wrong."""
    text = str(error).strip()
    named = isinstance(error, OSError | ValueError) and text
    return text if named else f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
