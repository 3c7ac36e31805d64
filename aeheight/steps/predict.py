"""Predict: the cube and a checkpoint to a map of heights, one shard a task."""

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np

from aeheight.cluster import Outcome, least_memory, wants_gpu
from aeheight.cube import Tree, create, open_tree, remove_tree
from aeheight.embeddings import BANDS
from aeheight.errors import InputError
from aeheight.models import Checkpoint
from aeheight.predictor import Predictor
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.settings import PredictSettings, fingerprint
from aeheight.steps.cover import batches_of, compute, lattice, predictor_for, settled, template
from aeheight.steps.estimate import Pace, Session, pace, remember
from aeheight.steps.run import Made, Plan, Run, carry_out, human_bytes
from aeheight.steps.train import load_checkpoint
from aeheight.store import Store
from aeheight.template import Shard, Template
from aeheight.windows import Region

MODEL = "model.ckpt"
"""The checkpoint a map was made with, kept beside its receipts, where every worker can read it."""

_NETWORK_BYTES_PER_PIXEL = 2_100
"""One pixel of one window at the peak of a U-Net++ with ResNet-18 in float32: measured 1,600 to
2,010 on windows of 256 to 1024 px (a U-Net: 1,030)."""
_PROCESS_BYTES = 1_300_000_000
_TASKS = 2
"""Tasks that a worker of this machine has at hand: one computes, one reads or writes."""
_TOLERANCE = 0.8
"""Of the memory that is foreseen, an upper bound: a worker with less may not begin."""
_WORTH_TIMING = 16
"""Batches: with fewer to go, timing a few first would cost more than it tells."""
_SCALE_LIMIT = 1.5
"""A model is used on pixels at most this much larger or smaller than those it was trained on."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be predicted, with what."""

    cube: Tree
    checkpoint: Checkpoint
    settings: PredictSettings
    """With window, halo and shard as numbers."""
    template: Template
    """Of the map."""

    @classmethod
    def of(cls, run: Run) -> "_Work":
        """Of a run, checked.

        Raises:
            InputError: no cube, no checkpoint, or a model that does not fit the region.
        """
        cube, checkpoint = run.whole_cube(), load_checkpoint(run)
        settings = settled(run.settings.predict, checkpoint, cube.template)
        work = cls(cube, checkpoint, settings, template(cube.template, checkpoint, settings))
        work._check()
        return work

    def begun_with(self) -> dict[str, Any]:
        """All that the map depends on; what computed it stands in the receipts."""
        return {
            "predict": self.settings.model_dump(mode="json", exclude={"device"}),
            "checkpoint": self.checkpoint.digest,
            "cube": self.cube.identity,
        }

    def shards(self, run: Run) -> list[Shard]:
        """Every shard of the map, with the cube's shards that its windows see."""
        below = Made(self.cube.template, run.ledger("cube").done())
        lattices = {grid.name: lattice(self.settings, grid.shape) for grid in self.template.grids}
        static: dict[str, int | None] = {"prior": None} if self.checkpoint.base == "prior" else {}
        return [
            replace(
                shard,
                inputs=fingerprint(
                    below.inputs(
                        shard.group,
                        {"embedding": shard.year} | static,
                        lattices[shard.group].hull(shard.region),
                    )
                ),
            )
            for shard in self.template.shards("height")
        ]

    def windows(self, shard: Shard) -> int:
        """How many windows a shard takes."""
        shape = self.template.grid(shard.group).shape
        return lattice(self.settings, shape).count(shard.region)

    def batches(self, shards: Sequence[Shard]) -> int:
        """How many forward passes some shards take."""
        return sum(batches_of(self.settings, self.template, s.group, s.region) for s in shards)

    def hull(self, shard: Shard) -> Region:
        """What a shard's task reads."""
        return lattice(self.settings, self.template.grid(shard.group).shape).hull(shard.region)

    def pace(self, run: Run, shards: Sequence[Shard]) -> Pace | None:
        """How fast the workers are, from a few windows of these shards."""
        model = self.checkpoint.to_bytes()
        return pace(run, self.cube, model, self.settings, shards)

    @property
    def worker_bytes(self) -> int:
        """What a worker process without a GPU takes at most, with all tasks that it has at hand."""
        settings, layers = self.settings, len(self.template.layers)
        assert settings.window is not None
        assert settings.shard is not None
        windows = lattice(settings, (settings.shard, settings.shard))
        cells = ceil(settings.shard / windows.stride) + (settings.shard % windows.stride > 0)
        hull = (cells * windows.stride + 2 * windows.margin) ** 2
        batch = settings.batch * settings.window**2
        network = _NETWORK_BYTES_PER_PIXEL if self.checkpoint.corrects else BANDS * 8
        sums = settings.shard**2 * 4 * layers * (6 if settings.blend else 2)
        return _PROCESS_BYTES + _TASKS * ((hull + 2 * batch) * (BANDS + 4) + sums) + batch * network

    def unfit(self, run: Run) -> str | None:
        """Why the workers cannot do this, with the remedy; None where they can.

        Raises:
            InputError: a GPU is asked for, and no worker has one.
        """
        client = run.connection.client(self.settings.device)
        if wants_gpu(client, self.settings.device):
            return None
        least = least_memory(client)
        if least is None or least >= self.worker_bytes * _TOLERANCE:
            return None
        return (
            f"a worker may take {human_bytes(self.worker_bytes)} for windows of "
            f"{self.settings.window} px, {self.settings.batch} at a time, and the smallest has "
            f"{human_bytes(least)}: give workers more memory (fewer --workers on this machine), or "
            "make predict.shard (or predict.window, predict.batch) smaller"
        )

    def _check(self) -> None:
        cube, checkpoint = self.cube.template, self.checkpoint
        trained, here = checkpoint.provenance.pixel_metres, cube.grids[0].pixel_metres()[0]
        if trained and not 1 / _SCALE_LIMIT < trained / here < _SCALE_LIMIT:
            raise InputError(
                f"the model was trained on pixels of {trained:g} m, this region's are {here:g} m: "
                "the same window shows other ground; use a model trained at this resolution"
            )
        halo = self.settings.halo or 0
        if len(cube.grids) > 1 and checkpoint.corrects and cube.cut.halo < halo:
            raise InputError(
                f"cube.halo {cube.cut.halo} is less than predict.halo {halo}: past a zone's edge "
                "the network would see nothing; make predict.halo smaller, or cube.halo larger"
            )
        if checkpoint.base == "prior" and not any(layer.name == "prior" for layer in cube.layers):
            raise InputError(
                "the model corrects a prior, and this region has none: give `prior`, or use a "
                "model trained without one"
            )


def plan(run: Run) -> Plan:
    """What predict would compute, from metadata; its time from a few windows on every worker.

    Raises:
        InputError: no cube, no checkpoint, windows that do not fit the model, or no GPU where one
            is asked for.
    """
    work = _Work.of(run)
    ledger, settings = run.ledger("heights"), work.settings
    if not run.options.overwrite:
        ledger.check(work.begun_with(), "predict")
    shards = work.shards(run)
    pending = shards if run.options.overwrite else ledger.pending(shards)
    area = sum(shard.region.size for shard in shards)
    assert settings.window is not None
    computed = work.batches(shards) * settings.batch * settings.window**2
    return Plan(
        "predict",
        {
            "model": work.checkpoint.model.architecture,
            "checkpoint": work.checkpoint.digest[:16],
            "shards": len(shards),
            "pending": len(pending),
            "shard_px": settings.shard,
            "windows": sum(map(work.windows, shards)),
            "window_px": settings.window,
            "halo_px": settings.halo,
            "halo": _halo_from(run, work.checkpoint),
            "batch": settings.batch,
            "layers": [layer.name for layer in work.template.layers],
            "extra_computation": round(computed / area, 2),
            "bytes_to_read": sum(work.hull(shard).size for shard in shards) * BANDS,
            "bytes_to_write": area * 4 * len(work.template.layers),
            "peak_worker_bytes": work.worker_bytes,
            **(_foreseen(run, work, pending) if pending else {}),
        },
    )


def _halo_from(run: Run, checkpoint: Checkpoint) -> str:
    """Who says how wide the halo is."""
    if run.settings.predict.halo is not None:
        return "as asked"
    if not checkpoint.corrects:
        return "none: a pixel-wise model"
    if checkpoint.seams is None:
        return "not measured: trained by an older version, which knew no novelty either"
    return "as training measured"


def _foreseen(run: Run, work: _Work, pending: Sequence[Shard]) -> dict[str, Any]:
    """What the workers that are there make of it."""
    if unfit := work.unfit(run):
        return {"refused": unfit}
    known = work.pace(run, pending)
    return {} if known is None else known.facts(work.batches(pending))


def execute(run: Run) -> Outcome:
    """Predict every pending shard.

    Raises:
        InputError: see `plan`; workers too small; or another model or other settings than those
            the map began with.
    """
    work, ledger = _Work.of(run), run.ledger("heights")
    overwrite = run.options.overwrite
    if not overwrite:
        ledger.check(work.begun_with(), "predict")
    shards = work.shards(run)
    pending = shards if overwrite else ledger.pending(shards)
    if pending and (unfit := work.unfit(run)):
        raise InputError(unfit)
    if overwrite:
        run.discard(ledger.store)
        remove_tree(run.heights)
    tree = create(run.heights, work.template)
    ledger = ledger.begin(work.begun_with() | {"heights": tree.identity})
    _keep_model(ledger.store, work.checkpoint)
    task = Predict(
        work.cube.store.uri,
        tree.store.uri,
        tree.identity,
        f"{work.cube.version} {tree.version}",
        ledger.store.uri,
        ledger.key,
        work.settings,
    )
    batches = work.batches(pending)
    known = work.pace(run, pending) if batches >= _WORTH_TIMING else None
    if known is not None:
        told = known.told(batches, as_json=run.options.as_json)
        print(told, file=sys.stderr, flush=True)  # noqa: T201
    outcome = carry_out(run, "predict", ledger, shards, task, work.settings.device)
    if pending:
        session = Session(
            estimate_seconds=round(known.seconds(batches), 1) if known else None,
            seconds=round(outcome.seconds, 1),
            shards=outcome.done,
            failed=len(outcome.failed),
            windows=sum(map(work.windows, pending)),
            workers=len(run.connection.client().nthreads()),
            device=known.device if known else None,
        )
        remember(ledger.store, session)
    return outcome


def _keep_model(store: Store, checkpoint: Checkpoint) -> None:
    """Put the checkpoint where workers read it, unless it is there.

    Another may be: of a map that was begun, and of which no shard was made.
    """
    with suppress(FileNotFoundError, InputError):
        if Checkpoint.from_bytes(store.read(MODEL)).digest == checkpoint.digest:
            return
    store.write(MODEL, checkpoint.to_bytes())


@dataclass(frozen=True, slots=True)
class Predict:
    """Makes one shard of the map; travels to workers as these few words."""

    cube: str
    heights: str
    identity: str
    version: str
    """Of the templates of both."""
    ledger: str
    key: str
    settings: PredictSettings

    def __call__(self, shard: Shard) -> Receipt:
        """Read, compute, write, leave the receipt."""
        started = time.monotonic()
        tools = _opened(self)
        values = compute(tools.cube, tools.predictor, self.settings, shard, shard.region)
        names = [layer.name for layer in tools.heights.template.layers]
        further = {
            name: tools.heights.write(replace(shard, layer=name), plane)
            for name, plane in zip(names[1:], values[1:], strict=True)
        }
        digest = tools.heights.write(shard, values[0])
        receipt = replace(
            receipt_for(shard, values[0], digest, ~np.isnan(values[0]), self.key, started),
            further=further,
            remarks=tuple(tools.predictor.remarks),
            device=tools.predictor.device,
        )
        Ledger(Store(self.ledger)).leave(receipt)
        return receipt


@dataclass(frozen=True, slots=True)
class _Tools:
    """What a worker keeps open for all shards of a map."""

    cube: Tree
    heights: Tree
    predictor: Predictor


_opening = threading.Lock()


def _opened(task: Predict) -> _Tools:
    """Once a worker and map, however many of its threads ask: the model stays on the device."""
    with _opening:
        return _open(task)


@lru_cache(maxsize=2)
def _open(task: Predict) -> _Tools:
    checkpoint = Checkpoint.from_bytes(Store(task.ledger).read(MODEL))
    predictor = predictor_for(checkpoint, task.settings)
    return _Tools(open_tree(Store(task.cube)), open_tree(Store(task.heights)), predictor)
