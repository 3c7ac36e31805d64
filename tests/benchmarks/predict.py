"""The whole predict step beside the network's forward pass on the same windows.

    python -m tests.benchmarks.predict [--minutes 0.5] [--rounds 1] [--workers N]
        [--checkpoint PATH] [--device cpu|gpu] [--tile PATH]

Makes a cube of real codes (mirrored), so large that the forward pass takes `--minutes`, and in
turns runs on it, each on workers of its own as `aeheight` starts them, whose start is left out:

- the network alone, on values that are decoded and in memory (on a GPU: in its memory);
- the model as `Predictor` gives it, from codes in memory to layers of the map;
- the step: read, decode, compute, write, leave receipts;
- reading and decoding alone, the same shards with all cores.

The aim on a CPU: the step takes at most 1.15 x the model. On a GPU, in half precision and at the
batch that is best there: at least 0.8 of the lower of two bounds, the model and the reading. Then
where a shard's CPU time goes, in this process. Without a checkpoint an untrained U-Net++ stands in.
"""

import argparse
import io
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from distributed.diagnostics.plugin import WorkerPlugin
from numpy.typing import NDArray

from aeheight.cluster import Client, Connection, Progress, run_shards
from aeheight.crew import gpu_slots
from aeheight.cube import create
from aeheight.embeddings import BANDS
from aeheight.inference import predict_region
from aeheight.models import Checkpoint
from aeheight.novelty import Novelty
from aeheight.predictor import Batch
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.settings import ModelSettings, PredictSettings, load_region
from aeheight.steps import predict
from aeheight.steps.cover import lattice, predictor_for, settled, template
from aeheight.steps.run import Options, Run
from aeheight.store import Store
from aeheight.template import Shard
from aeheight.windows import Region
from tests.benchmarks import TILE, machine, markdown, mirrored, real_codes
from tests.benchmarks.overlap import high_water, write_cube
from tests.checkpoints import checkpoint_of, wild_weights

SHARD = 1024
HELD = 4
"""Batches that a worker holds in memory, to run them over and over."""
BATCHES = (1, 2, 4, 8, 16)
TRIAL = 2
"""Batches that are timed to find out how fast the forward pass is."""
AIM_CPU, AIM_GPU = 1.15, 0.8
KEYS = ("wall", "cpu")
NETWORK, MODEL, STEP, READING = "network alone", "model", "step", "reading and decoding alone"


@dataclass(frozen=True)
class Job:
    """The same work for all that is compared."""

    region: Path
    checkpoint: Path
    settings: PredictSettings
    """Settled."""
    workers: int
    gpu: bool

    def connection(self) -> Connection:
        """Fresh workers, as the command starts them."""
        return Connection(workers=self.workers, gpus=None if self.gpu else 0)

    def run(self, connection: Connection) -> Run:
        """As the command makes it."""
        chosen = [f"predict.device={self.settings.device}", f"predict.batch={self.settings.batch}"]
        options = Options(overwrite=True, checkpoint=str(self.checkpoint))
        return Run(load_region(self.region, chosen), options, connection)

    def shards(self) -> list[Shard]:
        """Of the map."""
        cube = Run(load_region(self.region, [])).open_cube().template
        return template(cube, _checkpoint(self.checkpoint), self.settings).shards("height")


@dataclass(frozen=True)
class Took:
    """What one way cost."""

    wall: float
    cpu: float
    """Seconds of all workers."""
    peak: float
    """Bytes of the largest worker."""


def main() -> None:
    """Measure and print."""
    options = _options()
    with TemporaryDirectory() as folder:
        job = prepared(Path(folder), options)
        shards = job.shards()
        print(heading(job, shards), flush=True)
        rounds = [measured(job, shards) for _ in range(options.rounds)]
        print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n")
        ways = [ways for ways, _ in rounds]
        print(table(ways, sum(shard.region.size for shard in shards), job.gpu), end="\n\n")
        print(promises(ways[-1][STEP], rounds[-1][1]), end="\n\n")
        print(stages(Path(folder), job, shards[: options.staged]))


def heading(job: Job, shards: list[Shard]) -> str:
    """What is measured, and where."""
    device = torch.cuda.get_device_name() if job.gpu else "cpu"
    cut = job.settings
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {device}; {job.workers} workers; "
        f"{len(shards)} shards of {cut.shard} px, windows of {cut.window} px with a halo of "
        f"{cut.halo} px, {cut.batch} at a time"
    )


def measured(job: Job, shards: list[Shard]) -> tuple[dict[str, Took], dict[str, Any]]:
    """One round of everything, so that what else runs on the machine disturbs all alike."""
    windows = sum(_windows(job, shard) for shard in shards)
    network, model = (forward(job, windows, alone=alone) for alone in (True, False))
    made, facts = step(job)
    return {NETWORK: network, MODEL: model, STEP: made, READING: reading(job, shards)}, facts


def _windows(job: Job, shard: Shard) -> int:
    return lattice(job.settings, _cube(str(job.region)).template.grid(shard.group).shape).count(
        shard.region
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=0.5, help="of forward pass in a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 1) // 2, 1))
    parser.add_argument("--checkpoint", type=Path, help="such as runs/demo/model/best.ckpt")
    parser.add_argument("--tile", type=Path, default=TILE, help="a real tile to mirror")
    parser.add_argument("--staged", type=int, default=4, help="shards of the last table")
    parser.add_argument("--device", choices=("cpu", "gpu"),
                        default="gpu" if torch.cuda.is_available() else "cpu")  # fmt: skip
    return parser.parse_args()


def prepared(work: Path, options: argparse.Namespace) -> Job:
    """The checkpoint, the best batch, and a cube that takes long enough."""
    gpu = options.device == "gpu"
    path = options.checkpoint or work / "untrained.ckpt"
    if options.checkpoint is None:
        path.write_bytes(untrained().to_bytes())
    codes = mirrored(real_codes(options.tile), SHARD)
    (work / "trial").mkdir()
    trial = write_cube(work / "trial", codes, (2, 2), SHARD, device=options.device)
    run = Run(load_region(trial, []))
    settings = settled(run.settings.predict, _checkpoint(path), run.open_cube().template)
    job = Job(trial, path, settings, options.workers, gpu)
    batches = BATCHES if gpu else (settings.batch,)
    seconds = {batch: _seconds(with_batch(job, batch)) for batch in batches}
    best = min(seconds, key=lambda batch: seconds[batch])
    windows = math.ceil(options.minutes * 60 / seconds[best])
    # As many for each worker, and nearly square.
    rows = max(round(math.sqrt(windows) / options.workers), 1) * options.workers
    board = (rows, max(math.ceil(windows / rows), 1))
    region = write_cube(work, codes, board, SHARD, device=options.device)
    return with_batch(replace(job, region=region), best)


def untrained() -> Checkpoint:
    """The default network with weights at random; it costs what a trained one costs."""
    model, rng = ModelSettings(), np.random.default_rng(0)
    seen = Novelty(rng.integers(-127, 128, (128, BANDS), dtype=np.int8), 50.0)
    return checkpoint_of(model, weights=wild_weights(model), novelty=seen)


@lru_cache(maxsize=1)
def _checkpoint(path: Path) -> Checkpoint:
    return Checkpoint.from_bytes(path.read_bytes())


def with_batch(job: Job, batch: int) -> Job:
    """The job with other batches."""
    return replace(job, settings=job.settings.model_copy(update={"batch": batch}))


def _seconds(job: Job) -> float:
    """For one window, all workers together."""
    batch = job.settings.batch
    windows = TRIAL * batch * job.workers
    return forward(job, windows, alone=False).wall / windows


def forward(job: Job, windows: int, *, alone: bool) -> Took:
    """The forward pass over so many windows, shared by all workers.

    Args:
        job: the work.
        windows: rounded up to whole batches.
        alone: the network on decoded values, not the model on codes.
    """
    with job.connection() as connection:
        client = connection.client()
        places = list(gpu_slots(client)) if job.gpu else list(client.nthreads())
        task = Forward(str(job.region), str(job.checkpoint), job.settings, alone)
        client.gather([client.submit(task, 1, workers=[p], pure=False) for p in places])  # warm
        batches = math.ceil(windows / job.settings.batch / len(places))
        return took(client, lambda: client.gather(
            [client.submit(task, batches, workers=[p], pure=False) for p in places]))  # fmt: skip


def took(client: Client, work: Callable[[], object]) -> Took:
    """Time it."""
    cpu, wall = sum(client.run(time.process_time).values()), time.monotonic()
    work()
    wall = time.monotonic() - wall
    cpu = sum(client.run(time.process_time).values()) - cpu
    return Took(wall, cpu, max(client.run(high_water).values()))


@dataclass(frozen=True)
class Forward:
    """Runs windows that are in memory, over and over."""

    region: str
    checkpoint: str
    settings: PredictSettings
    alone: bool

    def __call__(self, batches: int) -> None:
        """So many batches."""
        run, held = _loaded(self)
        running: deque[Callable[[], object]] = deque()
        for number in range(batches):
            running.append(run(held[number % len(held)]))
            if len(running) > 1:  # a GPU is given the next while it computes
                running.popleft()()
        while running:
            running.popleft()()


Begin = Callable[[Any], Callable[[], object]]
"""Begins with a batch; what it gives waits for it."""


@lru_cache(maxsize=1)
def _loaded(task: Forward) -> tuple[Begin, list[Any]]:
    """The model, and the batches that it takes."""
    predictor = predictor_for(_checkpoint(Path(task.checkpoint)), task.settings)
    held = _held(Path(task.region), task.settings)
    halo, model, on_gpu = task.settings.halo or 0, predictor._model, predictor._on_gpu
    if not task.alone:
        return lambda codes: predictor.submit(codes, None, halo).result, held
    network, half = model.network, predictor._dtype
    assert network is not None

    def begin(values: torch.Tensor) -> Callable[[], object]:
        with torch.inference_mode(), torch.autocast(values.device.type, half, enabled=on_gpu):
            network(values)
        return torch.cuda.synchronize if on_gpu else lambda: None

    with torch.inference_mode():
        return begin, [model._decoded(torch.from_numpy(c).to(model.device)) for c in held[:2]]


def _held(region: Path, settings: PredictSettings) -> list[NDArray[np.int8]]:
    """(batch, 64, w, w) codes each."""
    cube = Run(load_region(region, [])).open_cube()
    (grid,), (year,) = cube.template.grids, cube.template.years
    rows, cols = (max(size - (settings.window or 0), 1) for size in grid.shape)
    spots = np.random.default_rng(0).integers(0, (rows, cols), (HELD, settings.batch, 2))
    edge = settings.window or 0
    return [
        np.stack([cube.read(grid.name, "embedding", year, Region(int(row), int(col), edge, edge))
                  for row, col in part])
        for part in spots
    ]  # fmt: skip


def step(job: Job) -> tuple[Took, dict[str, Any]]:
    """The step, and what its plan said."""
    with job.connection() as connection:
        client = connection.client()
        client.register_plugin(FromTheFirst())
        run = job.run(connection)
        facts = dict(predict.plan(run).facts)
        outcome = predict.execute(run)
        if outcome.failed:
            raise RuntimeError(next(iter(outcome.failed.values())))
        cpu = sum(client.run(cpu_since).values())
        return Took(outcome.seconds, cpu, max(client.run(high_water).values())), facts


class FromTheFirst(WorkerPlugin):
    """Notes a worker's CPU time before its first shard: the calibration is no part of the step."""

    name = "from-the-first"

    def setup(self, worker: Any) -> None:
        """On each worker."""
        self._worker = worker

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """Of a task."""
        first = finish == "executing" and key[0].startswith("predict-")
        if first and not hasattr(self._worker, "cpu_before"):
            self._worker.cpu_before = time.process_time()


def cpu_since(dask_worker: Any) -> float:
    """CPU seconds of a worker since its first shard."""
    return time.process_time() - getattr(dask_worker, "cpu_before", time.process_time())


def reading(job: Job, shards: list[Shard]) -> Took:
    """What the step reads, with as many processes as there are cores."""
    with Connection(workers=os.cpu_count() or 1, gpus=0) as connection:
        client = connection.client()
        task = Read(str(job.region), job.settings)
        client.gather([client.submit(task, shards[0], workers=[place], pure=False)
                       for place in client.nthreads()])  # fmt: skip
        progress = Progress("read", len(shards), stream=io.StringIO())
        return took(client, lambda: run_shards(client, task, shards, progress))


@dataclass(frozen=True)
class Read:
    """Reads what a shard of the map is made from."""

    region: str
    settings: PredictSettings

    def __call__(self, shard: Shard) -> Receipt:
        """Read it, and no more."""
        cube = _cube(self.region)
        laid = lattice(self.settings, cube.template.grid(shard.group).shape)
        cube.read(shard.group, "embedding", shard.year, laid.hull(shard.region))
        return Receipt(shard.name, "", shard.region.size, 0, None, None, None, "", 0.0)


@lru_cache(maxsize=1)
def _cube(region: str) -> Any:
    return Run(load_region(region, [])).open_cube()


def table(rounds: list[dict[str, Took]], area: int, gpu: bool) -> str:
    """Medians of the rounds; ratios are taken within each round."""
    lines = []
    for name in rounds[0]:
        wall, cpu = (float(median(getattr(one[name], key) for one in rounds)) for key in KEYS)
        over = [
            float(median(getattr(one[STEP], key) / getattr(one[name], key) for one in rounds))
            for key in KEYS
        ]
        lines.append([name, wall, cpu, area / wall / 1e6, *over])
    head = ["", "wall s", "CPU s", "Mpx/s of the map", "step / this", "CPU: step / this"]
    return f"{markdown(head, lines)}\n\n{_verdict(rounds, gpu)}"


def _verdict(rounds: list[dict[str, Took]], gpu: bool) -> str:
    if not gpu:
        ratio = median(one[STEP].wall / one[MODEL].wall for one in rounds)
        return f"the step takes {ratio:.3g} x the model; aim: at most {AIM_CPU}"
    rule = max((MODEL, READING), key=lambda name: median(one[name].wall for one in rounds))
    share = median(one[rule].wall / one[STEP].wall for one in rounds)
    return f"{rule} is the lower bound; the step reaches {share:.3g} of it; aim: {AIM_GPU}"


def promises(took: Took, facts: dict[str, Any]) -> str:
    """What the plan said beside what came."""
    rows = [
        ["seconds", float(facts["estimated_seconds"]), took.wall],
        ["peak of a worker, MB", facts["peak_worker_bytes"] / 1e6, took.peak / 1e6],
        ["computed / area", facts["extra_computation"], ""],
    ]
    return markdown(["", "plan", "truth"], rows)


def stages(work: Path, job: Job, shards: list[Shard]) -> str:
    """CPU seconds for a GB of the map's codes, in this process, by what they are spent on."""
    staged = Stages(work, job)
    staged.make(shards[0])  # warm
    staged.spent.clear()
    for shard in shards:
        staged.make(shard)
    size = sum(shard.region.size for shard in shards) * BANDS / 1e9
    total = sum(staged.spent.values())
    rows = [[name, spent / size, 100 * spent / total] for name, spent in staged.spent.items()]
    return markdown(["a shard's CPU", "CPU s/GB of codes", "%"], rows)


class Stages:
    """Makes shards as the step does, one stage after the other."""

    def __init__(self, work: Path, job: Job) -> None:
        checkpoint, self._cube = _checkpoint(job.checkpoint), _cube(str(job.region))
        self._settings, made = job.settings, template(self._cube.template, checkpoint, job.settings)
        self._predictor = predictor_for(checkpoint, job.settings)
        self._heights = create(Store.at(work / "stages.zarr"), made)
        self._ledger = Ledger(Store.at(work / "stages.receipts"), "key")
        self.spent: defaultdict[str, float] = defaultdict(float)
        """CPU seconds of this process, all its threads."""

    def make(self, shard: Shard) -> None:
        """One shard."""
        laid = lattice(self._settings, self._cube.template.grid(shard.group).shape)
        with self._timed("read and decode"):
            codes = self._cube.read(shard.group, "embedding", shard.year, laid.hull(shard.region))
        with self._timed("fill batches"):
            values = predict_region(
                self._forward, laid, shard.region, self._settings.batch, lambda _: codes,
                layers=len(self._predictor.layers),
            )  # fmt: skip
        with self._timed("write, with its receipt"):
            self._write(shard, values)

    def _forward(self, codes: NDArray[np.int8], _prior: object, halo: int) -> Batch:
        with self._timed("forward"):
            batch = self._predictor.submit(codes, None, halo)
            batch.result()
        return batch

    def _write(self, shard: Shard, values: NDArray[np.float32]) -> None:
        digests = [
            self._heights.write(replace(shard, layer=layer), plane)
            for layer, plane in zip(self._predictor.layers, values, strict=True)
        ]
        known = ~np.isnan(values[0])
        self._ledger.leave(receipt_for(shard, values[0], digests[0], known, "key", 0.0))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Less what is timed inside."""
        before, others = time.process_time(), sum(self.spent.values())
        yield
        inside = sum(self.spent.values()) - others
        self.spent[stage] += time.process_time() - before - inside


if __name__ == "__main__":
    main()
