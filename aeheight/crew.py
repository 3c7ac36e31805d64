"""The workers as the driver sees them: which are there, which one hangs, and starting it anew."""

import time
from collections.abc import Collection, Mapping
from typing import Any

from distributed import Client

from aeheight.connection import gpu_slots

_REFRESH = 0.5
"""Seconds between two questions of which workers there are."""
_GONE = 10.0
"""Seconds without a worker before that is said."""
_TIMES = 20
"""A worker never hangs before its task took so many times the longest that finished."""
_KILL = 30.0
"""Seconds for a worker to end; the scheduler then forgets it, ended or not."""

Key = tuple[str, str]
"""Of a Dask task."""


class Crew:
    """The workers that take a step's tasks, as they were a moment ago."""

    def __init__(self, client: Client, *, gpu: bool, limit: float) -> None:
        """Remember whom to ask.

        Args:
            client: an open client.
            gpu: the tasks ask for a GPU: only workers that declare some count.
            limit: seconds that a task may always take.
        """
        self._client, self._gpu, self._limit = client, gpu, limit
        self._slots: dict[str, int] = {}
        self._seen = self._judged = float("-inf")
        self._there = time.monotonic()
        self._missed = False
        self._longest = 0.0
        self._since: dict[tuple[str, Key], float] = {}

    @property
    def slots(self) -> int:
        """Tasks that run at a time; one where no worker is there."""
        return max(sum(self._slots.values()), 1)

    @property
    def size(self) -> int:
        """Workers; one where none is there."""
        return max(len(self._slots), 1)

    @property
    def limit(self) -> float:
        """Seconds that a task may take at present."""
        return max(self._limit, _TIMES * self._longest)

    def took(self, seconds: float) -> None:
        """Learn from a task that finished."""
        self._longest = max(self._longest, seconds)

    def refresh(self) -> bool:
        """Ask who is there, unless that was a moment ago.

        Returns:
            True once when there has been no worker for ten seconds.
        """
        now = time.monotonic()
        if now - self._seen < _REFRESH:
            return False
        self._seen = now
        self._refill()
        self._slots = gpu_slots(self._client) if self._gpu else self._client.nthreads()
        if self._slots:
            self._there, self._missed = now, False
        said, self._missed = self._missed, now - self._there > _GONE
        return self._missed and not said

    def _refill(self) -> None:
        """Have workers here that were lost for good started again.

        A nanny does not replace a worker that dies while the nanny still waits for it to start, and
        the cluster forgets a worker that is away for 15 s.
        """
        cluster = self._client.cluster
        if cluster is not None and len(cluster.workers) < len(cluster.worker_spec):
            cluster.scale(len(cluster.worker_spec))

    def hung(self, keys: Collection[Key]) -> dict[str, list[Key]]:
        """Workers that have run one of these tasks for too long, and which; asked now and then.

        Args:
            keys: of tasks that are out, in the order of submission, which is that of running.
        """
        now = time.monotonic()
        if now - self._judged < min(self._limit / 20, 10.0):
            return {}
        self._judged = now
        running = _running(self._client.processing(), keys, self._slots)
        self._since = {place: self._since.get(place, now) for place in running}
        late: dict[str, list[Key]] = {}
        for (worker, key), since in self._since.items():
            if now - since > self.limit:
                late.setdefault(worker, []).append(key)
        return late

    def replace(self, workers: Collection[str]) -> None:
        """Kill workers, be they stopped or busy; their tasks go elsewhere.

        A nanny starts another in the same place. Without one the scheduler forgets the worker, and
        who started it may start another.
        """
        # Not Client.restart_workers, which refuses workers without a nanny.
        scheduler: Any = self._client.scheduler
        self._client.sync(
            scheduler.restart_workers,
            workers=list(workers),
            timeout=_KILL,
            wait_for_workers=False,
            on_error="return",
            stimulus_id=f"aeheight-hung-{time.time()}",
        )
        self._since = {
            place: since for place, since in self._since.items() if place[0] not in workers
        }


def least_memory(client: Client) -> int | None:
    """The smallest memory limit of a worker, bytes; None where none has one."""
    workers: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    return min((w["memory_limit"] for w in workers.values() if w["memory_limit"]), default=None)


def _running(
    processing: Mapping[str, Collection[Key]], keys: Collection[Key], slots: Mapping[str, int]
) -> list[tuple[str, Key]]:
    """Which worker runs which task: of those that it holds, the first; the others wait there.

    Args:
        processing: tasks on each worker, waiting or running; of other clients too.
        keys: as in `Crew.hung`.
        slots: tasks that each worker runs at a time.
    """
    place = {key: number for number, key in enumerate(keys)}
    return [
        (worker, key)
        for worker, held in processing.items()
        for key in sorted((key for key in held if key in place), key=place.__getitem__)[
            : slots.get(worker, 1)
        ]
    ]
