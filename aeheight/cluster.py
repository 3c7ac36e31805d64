"""Mapping a task over shards on Dask: bounded in flight, results released, failures listed.

A task carries only itself (a small frozen value) and a shard's name; it reads, computes, writes and
leaves its receipt on the worker, so that a driver may die at any time and lose nothing. Workers may
come and go: a shard is lost by none of them, and given up only when it is the likely cause.
"""

import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, cast

from dask.base import tokenize
from distributed import Client, get_worker
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from aeheight.connection import (
    PATIENCE,
    QUIET_THREADS,
    Connection,
    check_software,
    different_software,
    gpu_slots,
    no_gpu,
    software,
)
from aeheight.crew import Crew, Key, least_memory
from aeheight.progress import Progress, clock
from aeheight.receipts import Receipt
from aeheight.settings import Device
from aeheight.template import Shard

__all__ = [
    "LIMIT",
    "PATIENCE",
    "QUIET_THREADS",
    "Client",
    "Connection",
    "Device",
    "Outcome",
    "Progress",
    "Task",
    "clock",
    "least_memory",
    "on_each_worker",
    "run_shards",
    "wants_gpu",
]

LIMIT = 600.0
"""Seconds that a shard may always take before its worker counts as hung: the first may have to load
a model and compile it."""
_HANGS = 3
"""A shard that hung so many workers is given up."""
_AHEAD = 2
"""Tasks in flight for every thread of the cluster: enough that no worker ever waits."""
_ROUNDS = 2
"""A shard that Dask gave up because its workers died is tried once more."""
_EACH = 300.0
"""Seconds for what is asked of each worker."""
_TURN = 0.5
"""Seconds between two looks at the workers while nothing finishes."""

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
class _Result:
    """What a task hands back: a value also where it failed, so that no worker logs a traceback."""

    reason: str | None
    """Why it failed."""
    seconds: float | None = None
    """That it took on the worker."""
    suspect: bool = False
    """Its workers died: by its fault, a neighbour's or none."""
    remarks: tuple[str, ...] = ()
    """`Receipt.remarks`."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A worker that joined later, of another software than the driver's."""

    worker: str
    software: str


def _attempt(task: Task, shard: Shard, wanted: str) -> _Result | _Refusal:
    """Run on a worker."""
    if (here := software()) != wanted:
        return _Refusal(get_worker().address, here)
    started = time.monotonic()
    try:
        receipt = task(shard)
    except Exception as error:
        return _Result(_reason(error), time.monotonic() - started)
    return _Result(None, time.monotonic() - started, remarks=receipt.remarks)


def run_shards(
    client: Client,
    task: Task,
    shards: Sequence[Shard],
    progress: Progress,
    device: Device = "cpu",
    *,
    limit: float = LIMIT,
) -> Outcome:
    """Run a task for every shard; each shard succeeds or fails on its own.

    A worker whose shard is out for longer than `limit`, and 20 times the longest that finished, is
    started anew; the shard goes elsewhere, and fails when it has hung three workers. A shard whose
    workers died more often than Dask allows may have had bad luck, or a bad neighbour: it is tried
    again at the end, when no worker has more than one such shard, and fails when they die again.

    Args:
        client: an open client.
        task: picklable and small; it writes the shard and leaves the receipt itself.
        shards: each by one task only.
        progress: told of every shard.
        device: `gpu` asks workers that declare the resource GPU for one of it; `auto` does where
            there are any; `cpu` takes any worker.
        limit: seconds.

    Raises:
        InputError: no worker declares a GPU, or a worker's software is not the driver's.
        ConnectionError: the scheduler went away; what has a receipt is safe.
    """
    started = time.monotonic()
    failed: dict[str, str] = {}
    said: set[str] = set()
    pixels = 0
    flight = _Flight(client, task, progress, wants_gpu(client, device), limit)
    with closing(flight.results(shards)) as results:
        for shard, result in results:
            for remark in sorted(set(result.remarks) - said):
                progress.note(remark)
            said |= set(result.remarks)
            if result.reason is None:
                pixels += shard.region.size
            else:
                failed[shard.name] = result.reason
            failing = result.reason is not None
            progress.step(shard.region.size, failed=failing, seconds=result.seconds)
    done = len(shards) - len(failed)
    return Outcome(done, 0, failed, time.monotonic() - started, pixels)


def wants_gpu(client: Client, device: Device) -> bool:
    """Whether tasks ask for a GPU.

    Raises:
        InputError: `device` is `gpu`, and no worker declares one.
    """
    if device == "cpu":
        return False
    there = bool(gpu_slots(client))
    if device == "gpu" and not there:
        raise no_gpu()
    return there


def on_each_worker(
    client: Client, function: Callable[[Any], Any], argument: object, device: Device
) -> list[Any]:
    """What a function returns on every worker that takes a step's tasks, at the same time.

    Workers that die, fail or take longer than five minutes are left out.
    """
    (there,) = client.scatter([argument], broadcast=True)
    places = gpu_slots(client) if wants_gpu(client, device) else client.nthreads()
    running = {
        place: client.submit(
            function, there, workers=[place], pure=False, key=f"each-{uuid.uuid4().hex}"
        )
        for place in places
    }
    until = time.monotonic() + _EACH
    while time.monotonic() < until:
        present = client.nthreads()
        if all(future.done() or place not in present for place, future in running.items()):
            break
        time.sleep(_TURN)
    done = [future for future in running.values() if future.status == "finished"]
    answers: list[Any] = client.gather(done, errors="skip")
    client.cancel(list(running.values()))
    return answers


@contextmanager
def _scheduler_may_go() -> Iterator[None]:
    try:
        yield
    except (OSError, CancelledError) as error:  # Dask's CommClosedError is an OSError
        raise ConnectionError(
            f"the scheduler went away ({error}); run again: finished shards are kept"
        ) from error


@dataclass(slots=True)
class _Out:
    """A shard that is out to the workers."""

    shard: Shard
    future: Any
    hangs: int = 0
    """Workers that it hung."""


class _Flight:
    """The shards of one step on their way through the cluster."""

    def __init__(
        self, client: Client, task: Task, progress: Progress, gpu: bool, limit: float
    ) -> None:
        self._client, self._task, self._progress = client, task, progress
        self._loop: Any = client.loop
        # With the task in it (its store and settings): two runs may share a scheduler.
        self._prefix = f"{progress.label}-{tokenize(task)[:16]}"
        self._resources = {"GPU": 1} if gpu else None
        self._software = software()
        self._out: dict[Key, _Out] = {}
        self._answers: SimpleQueue[tuple[Key, object]] = SimpleQueue()
        self._crew = Crew(client, gpu=gpu, limit=limit)

    def results(self, shards: Sequence[Shard]) -> Generator[tuple[Shard, _Result]]:
        """Every shard with what came of it, in the order of finishing."""
        suspects: list[Shard] = []
        try:
            with _scheduler_may_go():
                for shard, result in self._round(shards, "", lambda: self._crew.slots * _AHEAD):
                    if result.suspect:
                        suspects.append(shard)
                    else:
                        yield shard, result
                yield from self._round(suspects, "-again", lambda: self._crew.size)
        finally:
            self._progress.end()
            for out in self._out.values():
                out.future.release()

    def _round(
        self, shards: Sequence[Shard], suffix: str, room: Callable[[], int]
    ) -> Iterator[tuple[Shard, _Result]]:
        """Every shard once; few are in flight at a time."""
        waiting = iter(shards)
        while True:
            self._look()
            # Workers may have joined since: there is room for as many as they can take now.
            for shard in islice(waiting, max(room() - len(self._out), 0)):
                self._submit(shard, suffix)
            if not self._out:
                return
            with suppress(Empty):
                key, answer = self._answers.get(timeout=_TURN)
                result = self._result(key, answer)
                yield self._out.pop(key).shard, result

    def _submit(self, shard: Shard, suffix: str) -> None:
        # A tuple: then all tasks are one group on the scheduler, which else remembers each.
        key = (self._prefix + suffix, shard.name)
        future = self._client.submit(
            _attempt, self._task, shard, self._software,
            key=key, pure=False, resources=self._resources,
        )  # fmt: skip
        self._out[key] = _Out(shard, future)
        self._loop.add_callback(_deliver, future, self._answers)

    def _result(self, key: Key, answer: object) -> _Result:
        """What came of a task."""
        match answer:
            case _Result():
                self._crew.took(answer.seconds or 0.0)
                return answer
            case _Refusal():
                raise different_software(f"the worker {answer.worker}", answer.software)
            case CancelledError() if (hangs := self._out[key].hangs) == _HANGS:
                return _Result(f"hung {hangs} workers, each for over {self._crew.limit:.0f} s")
            case CancelledError() | CommClosedError():
                raise answer
            case KilledWorker():
                return _killed(answer)
            case _:
                check_software(self._client)  # what a worker cannot unpickle, for example
                return _Result(_reason(cast(Exception, answer)))

    def _look(self) -> None:
        """See, now and then, which workers are there, and whether one hangs."""
        if self._crew.refresh():
            self._progress.note("no worker is there; waiting for one")
        hung = self._crew.hung(self._out)
        for worker, keys in hung.items():
            for key in keys:
                self._blame(worker, self._out[key])
        if hung:
            self._crew.replace(hung)

    def _blame(self, worker: str, out: _Out) -> None:
        out.hangs += 1
        last = out.hangs == _HANGS
        self._progress.note(
            f"{out.shard.name} takes over {self._crew.limit:.0f} s on {worker}: "
            f"that worker is started anew, the shard {'given up' if last else 'done elsewhere'}"
        )
        if last:
            out.future.cancel()


async def _deliver(future: Any, answers: SimpleQueue[tuple[Key, object]]) -> None:
    """Run in the client's loop: fetching many results takes no longer than fetching one."""
    try:
        answer = await future
    except Exception as error:
        answer = error
    answers.put((future.key, answer))


def _killed(error: KilledWorker) -> _Result:
    deaths = _ROUNDS * (error.allowed_failures + 1)
    return _Result(
        f"KilledWorker: {deaths} workers died with it, the last at {error.last_worker.address}; "
        "too little memory is the usual cause, and its log may tell",
        suspect=True,
    )


def _reason(error: BaseException) -> str:
    """One line of what went wrong."""
    text = " ".join(str(error).split())
    named = isinstance(error, OSError | ValueError) and text
    return text if named else f"{type(error).__name__}: {text}"
