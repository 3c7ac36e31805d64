"""How long a map will take: a few windows on every worker before, the truth beside it after."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aeheight.cluster import clock, on_each_worker
from aeheight.cube import Tree, open_tree
from aeheight.models import Checkpoint
from aeheight.settings import PredictSettings
from aeheight.steps.cover import batches_of, compute, lattice, predictor_for
from aeheight.steps.run import Run
from aeheight.store import Store
from aeheight.template import Shard
from aeheight.windows import Region

SESSIONS = "sessions.json"
"""What every run of predict was expected to take, and took; beside the map's receipts."""
_TIMED = 2
"""Batches that are timed on every worker, after one to warm up."""
_SPOTS = 8
"""Where a worker may look for ground that has embeddings."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast all workers are together."""

    batches_per_second: float
    workers: int
    device: str

    def seconds(self, batches: int) -> float:
        """For so many batches."""
        return batches / self.batches_per_second

    def facts(self, batches: int) -> dict[str, Any]:
        """For a plan with so many batches to go."""
        return {
            "workers": self.workers,
            "device": self.device,
            "batches_per_second": float(f"{self.batches_per_second:.3g}"),
            "estimated_seconds": float(f"{self.seconds(batches):.3g}"),
        }

    def told(self, batches: int, *, as_json: bool) -> str:
        """A line before the work begins."""
        if as_json:
            return json.dumps({"step": "predict", **self.facts(batches)})
        seconds = clock(self.seconds(batches))
        return f"predict   {seconds} foreseen, on {self.workers} workers ({self.device})"


@dataclass(frozen=True, slots=True)
class Session:
    """One run of predict."""

    estimate_seconds: float | None
    """None: too short to be worth a calibration."""
    seconds: float
    """From the first task submitted to the last one done."""
    shards: int
    failed: int
    windows: int
    workers: int
    """That were there at its end."""
    device: str | None
    """None: not asked."""


def pace(
    run: Run, cube: Tree, model: bytes, settings: PredictSettings, shards: Sequence[Shard]
) -> Pace | None:
    """Time a few windows on all workers at the same time; nothing is written.

    Args:
        run: gives the workers.
        cube: to read from.
        model: the checkpoint.
        settings: settled.
        shards: to be predicted; windows are taken from all over them.

    Returns:
        None where no worker could be timed: no embeddings in the places looked at, or an error
        that the run itself will name.
    """
    client = run.connection.client(settings.device)
    spots = tuple(shards[k] for k in np.linspace(0, len(shards) - 1, _SPOTS).astype(int))
    timing = _Timing(cube.store.uri, cube.version, settings, spots)
    found = on_each_worker(client, timing, model, settings.device)
    rates = [rate for rate, _ in found if rate]
    if not rates:
        return None
    device = "; ".join(sorted({device for _, device in found}))
    return Pace(sum(rates) / len(rates) * len(found), len(found), device)


@dataclass(frozen=True, slots=True)
class _Timing:
    """Times a few windows on one worker."""

    cube: str
    version: str
    settings: PredictSettings
    spots: tuple[Shard, ...]

    def __call__(self, model: bytes) -> tuple[float | None, str]:
        """Batches a second, and the device."""
        cube, checkpoint = open_tree(Store(self.cube)), Checkpoint.from_bytes(model)
        predictor = predictor_for(checkpoint, self.settings)
        seconds: list[float] = []
        batches: list[int] = []
        for shard in self.spots:
            started = time.monotonic()
            region = self._first_batch(cube, shard)
            values = compute(cube, predictor, self.settings, shard, region)
            if not np.isnan(values[0]).all():
                seconds.append(time.monotonic() - started)
                batches.append(batches_of(self.settings, cube.template, shard.group, region))
            if len(seconds) > _TIMED:
                break
        return (sum(batches[1:]) / sum(seconds[1:]) if seconds[1:] else None), predictor.device

    def _first_batch(self, cube: Tree, shard: Shard) -> Region:
        """The ground that the first windows of a shard keep."""
        edge = lattice(self.settings, cube.template.grid(shard.group).shape).stride
        row, col = shard.region.row, shard.region.col
        wide = min(self.settings.batch * edge, shard.region.width)
        return Region(row, col, min(edge, shard.region.height), wide)


def remember(store: Store, session: Session) -> None:
    """Note a run of predict beside the receipts of its map."""
    store.write(SESSIONS, json.dumps([*sessions(store), asdict(session)], indent=1).encode())


def sessions(store: Store) -> list[dict[str, Any]]:
    """All runs of predict that made a map, in order; empty where none is noted, or legible."""
    try:
        found: list[dict[str, Any]] = json.loads(store.read(SESSIONS))
    except (FileNotFoundError, ValueError):  # a damaged note of times is worth no map
        return []
    return found
