"""Mapping a task over shards on Dask: bounded in flight, results released, failures listed.

A task carries only itself (a small frozen value) and a shard's name; it reads, computes, writes and
leaves its receipt on the worker, so that a driver may die at any time and lose nothing.
"""

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self, TextIO

from dask import config
from dask.base import tokenize
from dask.system import CPU_COUNT
from dask.utils import parse_timedelta
from distributed import Client, LocalCluster, as_completed
from distributed.comm.addressing import parse_address
from distributed.comm.core import CommClosedError
from distributed.comm.registry import get_backend

from aeheight.errors import InputError
from aeheight.receipts import Receipt
from aeheight.template import Shard

__all__ = ["Client", "Connection", "Outcome", "Progress", "Task", "clock", "run_shards"]

_AHEAD = 2
"""Tasks in flight for every thread of the cluster: enough that no worker ever waits."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MEMORY = {
    "MALLOC_ARENA_MAX": 1,
    "MALLOC_MMAP_THRESHOLD_": 1 << 25,
    "MALLOC_TRIM_THRESHOLD_": 1 << 26,
}
"""Bytes: the C library keeps some freed memory for the next chunk, for all threads together. Dask's
own setting gives it back to the kernel at once, which took 1.7 times the CPU of an ingest task."""
_PRELOADED = ["aeheight.cube", "aeheight.sources"]
"""What every task needs, and takes two seconds to import."""
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait must sleep: spinning ones made training 15 times slower on a busy machine."""

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


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a task failed: a value, so that no worker logs a traceback for what a user did."""

    reason: str


def _attempt(task: Task, shard: Shard) -> Receipt | _Failure:
    """Run on a worker."""
    try:
        return task(shard)
    except Exception as error:
        return _Failure(_reason(error))


class Connection:
    """A client of a given scheduler, or of worker processes on this machine; opened when needed.

    A context manager: what it opened ends with it.
    """

    def __init__(
        self, scheduler: str | None = None, workers: int | None = None, patience: float = 600
    ) -> None:
        """Remember where to connect.

        Args:
            scheduler: such as `tcp://host:8786`; None starts a cluster here.
            workers: processes here; None is one for every two cores. They share the cores evenly.
            patience: seconds to wait for the first worker of a given scheduler (and, up to 20, for
                the scheduler itself).
        """
        self._scheduler = scheduler
        self._workers = workers or max(CPU_COUNT // 2, 1)
        self._patience = patience
        self._opened = ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._client = None

    def client(self) -> Client:
        """The client, the same at every call.

        Raises:
            InputError: no scheduler answers at that address, or no worker joins it.
        """
        if self._client is None:
            self._client = self._remote(self._scheduler) if self._scheduler else self._local()
        return self._client

    def _local(self) -> Client:
        threads = str(max(CPU_COUNT // self._workers, 1))
        spawning = "distributed.nanny.pre-spawn-environ"
        memory = config.set({spawning: config.get(spawning) | _MEMORY})
        with _deaf_to_interrupts(), memory:
            cluster = LocalCluster(
                n_workers=self._workers,
                threads_per_worker=1,
                dashboard_address=":0",
                silence_logs=logging.CRITICAL,
                preload=_PRELOADED,
                env=dict.fromkeys(_THREAD_VARIABLES, threads) | QUIET_THREADS,
            )
        client: Client = Client(self._opened.enter_context(cluster))
        self._opened.enter_context(client)
        return client

    def _remote(self, scheduler: str) -> Client:
        try:
            scheme, place = parse_address(scheduler)
            get_backend(scheme).get_address_host(place)  # refuses what is no address
            # Dask's own setting may ask for more, where a scheduler's image has yet to be pulled.
            usual = parse_timedelta(config.get("distributed.comm.timeouts.connect"))
            client: Client = Client(scheduler, timeout=min(max(20, usual), self._patience))
        except (OSError, ValueError) as error:
            raise InputError(
                f"no Dask scheduler answers at {scheduler} ({error}); start one, or leave "
                "--scheduler out to work on this machine"
            ) from error
        try:
            self._opened.enter_context(client)
            client.wait_for_workers(1, timeout=self._patience)
        except TimeoutError as error:
            raise InputError(
                f"no worker joined {scheduler} within {self._patience:.0f} s; start some"
            ) from error
        return client


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: it is the driver's, which then ends them in order.

    A terminal sends Ctrl-C to all processes, and each worker would answer with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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

    def begin(self) -> None:
        """Say what is to be done, before workers have started."""
        if not self.as_json:
            print(f"{self.label:9} {self.total} shards to do", file=self.stream, flush=True)

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
            f"{left} left   {rate / 1e6:.2f} Mpx/s   {clock(to_go)} to go"
        )


def clock(seconds: float) -> str:
    """`0:42`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_shards(client: Client, task: Task, shards: Sequence[Shard], progress: Progress) -> Outcome:
    """Run a task for every shard; each shard succeeds or fails on its own.

    Args:
        client: an open client.
        task: picklable and small; it writes the shard and leaves the receipt itself.
        shards: each by one task only.
        progress: told of every shard.

    Raises:
        ConnectionError: the scheduler went away; what has a receipt is safe.
    """
    started = time.monotonic()
    failed: dict[str, str] = {}
    pixels = 0
    try:
        for shard, result in _results(client, task, shards, progress.label):
            if isinstance(result, _Failure):
                failed[shard.name] = result.reason
            else:
                pixels += shard.region.size
            progress.step(shard.region.size, failed=isinstance(result, _Failure))
    except (CommClosedError, CancelledError) as error:
        raise ConnectionError(
            f"the scheduler went away ({error}); run again: finished shards are kept"
        ) from error
    done = len(shards) - len(failed)
    return Outcome(done, 0, failed, time.monotonic() - started, pixels)


def _results(
    client: Client, task: Task, shards: Sequence[Shard], label: str
) -> Iterator[tuple[Shard, Receipt | _Failure]]:
    """Every shard with what came of it, in the order of finishing; few are in flight at a time."""
    # With the task in it (its store and settings): two runs may share a scheduler.
    prefix = f"{label}-{tokenize(task)[:16]}"
    resources = {"GPU": 1} if _has_gpus(client) else None
    names: dict[str, Shard] = {}

    def submit(shard: Shard) -> Any:
        key = f"{prefix}-{shard.name}"
        names[key] = shard
        return client.submit(_attempt, task, shard, key=key, pure=False, resources=resources)

    waiting = iter(shards)
    running = as_completed([submit(shard) for shard in islice(waiting, _room(client))])
    for future in running:
        failed = future.status == "error"
        yield (
            names.pop(future.key),
            # No worker could finish it: they kept dying.
            _Failure(_reason(future.exception())) if failed else future.result(),
        )
        future.release()
        # Workers may have joined since: there is room for as many as they can take now.
        for shard in islice(waiting, max(_room(client) - running.count(), 0)):
            running.add(submit(shard))


def _room(client: Client) -> int:
    """Tasks that may be in flight."""
    threads: int = sum(client.nthreads().values())
    return max(threads, 1) * _AHEAD


def _has_gpus(client: Client) -> bool:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any("GPU" in worker["resources"] for worker in workers)


def _reason(error: BaseException) -> str:
    """One line of what went wrong."""
    text = " ".join(str(error).split())
    named = isinstance(error, OSError | ValueError) and text
    return text if named else f"{type(error).__name__}: {text}"
