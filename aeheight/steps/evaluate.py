"""Evaluate: the sums of every shard, one a task; merged once, they make the report."""

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.cluster import Outcome
from aeheight.correlation import LAGS, Variogram
from aeheight.cube import Tree, checksum, find, open_tree
from aeheight.errors import InputError, NotYetError
from aeheight.grid import Grid, owned
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats, dump
from aeheight.models import Checkpoint, Provenance
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.settings import fingerprint
from aeheight.splits import USES
from aeheight.steps.edges import compare, facing, opposite
from aeheight.steps.predict import MODEL
from aeheight.steps.run import Made, Plan, Run, carry_out
from aeheight.steps.split import check_split, record_split, split_fingerprint
from aeheight.steps.summary import (
    CORRELATED,
    INTERVAL_KEYS,
    INTERVALS,
    REPORT,
    part_key,
    summarise,
    thin,
    variogram_key,
)
from aeheight.store import Store
from aeheight.template import Shard, Template
from aeheight.windows import Region

SLOPES = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 90.0)
"""Class edges of the slope, degrees."""

NOVELTIES = (0.0, 0.5, 1.0, 2.0, np.inf)
"""Class edges of the novelty; 1 is where 99 % of the validation ground lies below."""


def plan(run: Run) -> Plan:
    """What evaluate would read, from metadata alone.

    Raises:
        InputError: the region has no height, or there is no cube yet.
    """
    _need_height(run)
    tree = run.whole_cube()
    check_split(run.settings, tree.template.grids)
    maps = run.ledger("heights").store
    made = Checkpoint.from_bytes(maps.read(MODEL)) if maps.exists(MODEL) else None
    cube, year = tree.template, _judged_year(tree.template, made)
    heights = open_tree(run.heights).template if find(run.heights) else cube
    shards = _shards(run, cube, heights, year)
    floats = sum(layer.dtype == "float32" for layer in cube.layers)
    floats += sum(_tells(heights, name) for name in ("novelty", "spread"))
    per_pixel = 64 + 4 * floats + 5
    return Plan(
        "evaluate",
        {
            "year": year,
            "shards": len(shards),
            "pending": run.left("report", shards),
            "bytes_to_read": per_pixel * sum(shard.region.size for shard in shards),
            "peak_worker_bytes": 300_000_000 + cube.cut.shard**2 * 250,
        },
    )


def _need_height(run: Run) -> None:
    if run.settings.height is None:
        raise InputError("evaluation needs a reference: the region has no `height`")


def _judged_year(cube: Template, checkpoint: Checkpoint | None) -> int:
    """The first year that the model was trained on, else the first: references carry no year."""
    known = checkpoint.provenance.years if checkpoint else ()
    trained = [year for year in cube.years if year in known]
    return (trained or cube.years)[0]


def _tells(heights: Template, name: str) -> bool:
    return any(layer.name == name for layer in heights.layers)


def _shards(run: Run, cube: Template, heights: Template, year: int) -> list[Shard]:
    """One a shard of the cube's heights, in the year that is judged.

    Each with the shards of cube and map that it is summed from; the map may be cut otherwise.
    """
    read: dict[str, int | None] = {"embedding": year, "height": None}
    if any(layer.name == "prior" for layer in cube.layers):
        read["prior"] = None
    below = Made(cube, run.ledger("cube").done())
    above = Made(heights, run.ledger("heights").done())
    return [
        Shard(
            shard.group,
            "report",
            year,
            shard.region,
            fingerprint(
                below.inputs(shard.group, read, shard.region.expand(1))
                + above.inputs(shard.group, {"height": year}, shard.region)
                + _across(above, cube, shard, year)
            ),
        )
        for shard in cube.shards("height")
    ]


def _across(above: Made, cube: Template, shard: Shard, year: int) -> list[str]:
    """What the other zones' predictions were made from that a shard is compared with."""
    grid, inputs = cube.grid(shard.group), []
    for other in facing(cube.grids, grid):
        seen = opposite(grid, shard.region, other)
        found = above.inputs(other.name, {"height": year}, seen) if seen else []
        inputs += found if any(found) else []  # grids overlap more widely than predictions
    return inputs


def execute(run: Run) -> Outcome:
    """Sum up every pending shard, then write metrics.json and the page.

    Raises:
        InputError: the region has no height, the map is not whole, or its model was trained on
            another split of this ground.
    """
    _need_height(run)
    cube = run.whole_cube()
    checkpoint = _whole_map(run, cube)
    _refuse_other_split(run, cube, checkpoint.provenance)
    ledger = run.ledger("report")
    if run.options.overwrite:
        run.discard(ledger.store, run.ledger("split").store)
        for name in REPORT:
            run.report.remove(name)
    split = record_split(run)
    edges = _height_edges(run, cube.template)
    heights = open_tree(run.heights)
    year = _judged_year(cube.template, checkpoint)
    classes = {"slope": SLOPES, "height": edges}
    if _tells(heights.template, "novelty"):
        classes["novelty"] = NOVELTIES
    recorded = {f"{name}_classes": _finite(ends) for name, ends in classes.items()}
    recorded["correlation_lags"] = list(LAGS)
    settings = {
        "heights": heights.identity,
        "checkpoint": checkpoint.digest,
        "cube": cube.identity,
        "split": split,
        "year": year,
        **recorded,
    }
    found = ledger.settings()
    if found is not None and found | recorded == settings != found:
        ledger.discard()  # later heights have moved the classes: the sums are made again
    ledger = ledger.begin(settings)
    task = SumUp(
        cube.store.uri,
        heights.store.uri,
        heights.identity,
        f"{cube.version} {heights.version}",
        run.ledger("heights").store.uri,
        ledger.store.uri,
        ledger.key,
        edges,
    )
    shards = _shards(run, cube.template, heights.template, year)
    outcome = carry_out(run, "evaluate", ledger, shards, task)
    if not outcome.failed and (outcome.done or not run.report.exists("index.html")):
        summarise(run, cube.template, heights.template, year, shards, checkpoint, classes)
    return outcome


def _refuse_other_split(run: Run, cube: Tree, trained: Provenance) -> None:
    learnt = [(trained.cube, trained.split)]
    learnt += [(further.cube, further.split) for further in trained.also or ()]
    split = split_fingerprint(run.settings)
    if any(identity == cube.identity and known != split for identity, known in learnt):
        raise InputError(
            "the model was trained on another split of this very ground: its test pixels may have "
            "been training pixels; train again with --overwrite, or set `split` back"
        )


def _finite(edges: tuple[float, ...]) -> list[float]:
    """JSON has no infinity: a class without an end is known by its beginning."""
    return [edge for edge in edges if np.isfinite(edge)]


def _whole_map(run: Run, cube: Tree) -> Checkpoint:
    """The checkpoint of a map that is complete, and of this very cube."""
    ledger = run.ledger("heights")
    settings = ledger.settings()
    if settings is None or find(run.heights) is None:
        raise NotYetError(f"there is no map at {run.heights.uri} yet; run aeheight predict")
    if settings["cube"] != cube.identity:
        raise InputError(
            f"{run.heights.uri} is the map of an older cube: the cube was made anew since; run "
            "aeheight predict --overwrite"
        )
    if left := ledger.pending(open_tree(run.heights).template.shards("height")):
        raise NotYetError(f"{len(left)} shards of the map are missing; run aeheight predict")
    return Checkpoint.from_bytes(ledger.store.read(MODEL))


def _height_edges(run: Run, cube: Template) -> tuple[float, ...]:
    """Round class edges, at most ten classes, that span the reference; metres."""
    ledger = run.ledger("cube").current()
    receipts = list(ledger.receipts(shard.name for shard in cube.shards("height")))
    lows = [r.minimum for r in receipts if r.minimum is not None]
    highs = [r.maximum for r in receipts if r.maximum is not None]
    return round_edges(min(lows), max(highs)) if lows else (0.0, 1.0)


def round_edges(low: float, high: float) -> tuple[float, ...]:
    """Edges on multiples of 1, 2 or 5 times a power of ten, at most ten classes.

    >>> round_edges(3.2, 118.0)
    (0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0)
    """
    span = max(high - low, 1e-3)
    steps = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]
    step = next(step for step in steps if span / step <= 8)
    first, last = np.floor(low / step), np.floor(high / step) + 1
    return tuple(float(k * step) for k in np.arange(first, last + 1))


@dataclass(frozen=True, slots=True)
class SumUp:
    """Makes the sums of one shard; travels to workers as these few words."""

    cube: str
    heights: str
    identity: str
    version: str
    """Of the templates of both."""
    heights_ledger: str
    ledger: str
    key: str
    height_edges: tuple[float, ...]

    def __call__(self, shard: Shard) -> Receipt:
        """Read, sum up, store the sums, leave the receipt."""
        started = time.monotonic()
        cube, heights, checkpoint = _opened(
            self.cube, self.heights, self.identity, self.version, self.heights_ledger
        )
        grid = cube.template.grid(shard.group)
        ground = _Ground.read(cube, heights, checkpoint, shard)
        sums: dict[str, Stats | Scatter] = dict(ground.tables())
        criteria = {
            "slope": (ground.slope, SLOPES),
            "height": (ground.reference, self.height_edges),
        }
        if ground.novelty is not None:
            criteria["novelty"] = (ground.novelty, NOVELTIES)
        for name, (values, edges) in criteria.items():
            sums |= ground.classes(name, values, edges)
        assert shard.year is not None
        sums |= compare(heights, shard.group, shard.year, shard.region, ground.predicted)
        held = dict(ground.intervals(criteria))
        data = _pack(sums, held, ground, thin(grid.shape), shard.region)
        ledger = Ledger(Store(self.ledger))
        ledger.store.write(part_key(self.key, shard), data)
        receipt = receipt_for(
            shard,
            ground.predicted,
            checksum(np.frombuffer(data, np.uint8)),
            ~np.isnan(ground.predicted),
            self.key,
            started,
        )
        ledger.leave(receipt)
        return receipt


@lru_cache(maxsize=2)
def _opened(
    cube: str, heights: str, _identity: str, _version: str, ledger: str
) -> tuple[Tree, Tree, Checkpoint]:
    checkpoint = Checkpoint.from_bytes(Store(ledger).read(MODEL))
    return open_tree(Store(cube)), open_tree(Store(heights)), checkpoint


@dataclass(frozen=True, slots=True)
class _Ground:
    """One shard: all (rows, columns)."""

    reference: NDArray[np.float32]
    predicted: NDArray[np.float32]
    use: NDArray[np.uint8]
    slope: NDArray[np.float32]
    baselines: dict[str, NDArray[np.float32]]
    novelty: NDArray[np.float32] | None
    """None: the map does not tell."""
    spread: NDArray[np.float32] | None
    """Likewise."""

    @classmethod
    def read(cls, cube: Tree, heights: Tree, checkpoint: Checkpoint, shard: Shard) -> "_Ground":
        group, region, year = shard.group, shard.region, shard.year
        around = cube.read(group, "height", None, region.expand(1))
        codes = cube.read(group, "embedding", year, region)
        # Ground that two zones hold is judged in the one that it lies in.
        own = owned(cube.template.grids, cube.template.grid(group), region)
        reference = np.where(own, around[1:-1, 1:-1], np.float32(np.nan))
        ridge = checkpoint.ridge.predict(codes)
        baselines = {"mean": np.full_like(ridge, checkpoint.ridge.mean), "ridge": ridge}
        if any(layer.name == "prior" for layer in cube.template.layers):
            baselines["prior"] = cube.read(group, "prior", None, region)
        predicted = heights.read(group, "height", year, region)
        for values in baselines.values():  # judged on the model's ground, to be comparable
            values[np.isnan(predicted)] = np.nan
        return cls(
            reference,
            predicted,
            cube.read(group, "split", None, region),
            slope(around, *_pixel(cube.template.grid(group), region)),
            baselines,
            *(
                heights.read(group, name, year, region) if _tells(heights.template, name) else None
                for name in ("novelty", "spread")
            ),
        )

    def tables(self) -> Iterator[tuple[str, Stats | Scatter]]:
        for split, judged in self._splits():
            for name, values in {"model": self.predicted, **self.baselines}.items():
                yield f"{name}/{split}", self._stats(values, judged)
            yield (
                f"scatter/{split}",
                Scatter.of(
                    self.predicted,
                    self.reference,
                    reference_valid=judged,
                    predicted_valid=~np.isnan(self.predicted),
                ),
            )

    def classes(
        self, name: str, values: NDArray[np.float32], edges: tuple[float, ...]
    ) -> Iterator[tuple[str, Stats]]:
        for key, chosen in self._classed(name, values, edges):
            yield key, self._stats(self.predicted, chosen)

    def intervals(
        self, criteria: Mapping[str, tuple[NDArray[np.float32], tuple[float, ...]]]
    ) -> Iterator[tuple[str, Intervals]]:
        """By the keys of the model's `Stats`, of splits and of each criterion's classes."""
        if self.spread is None:
            return
        errors = self.predicted - self.reference
        splits = ((f"model/{split}", judged) for split, judged in self._splits())
        classes = (self._classed(name, *ends) for name, ends in criteria.items())
        for key, judged in chain(splits, *classes):
            known = judged & ~np.isnan(self.spread)
            yield key, Intervals.of(errors[known], self.spread[known])

    def _classed(
        self, name: str, values: NDArray[np.float32], edges: tuple[float, ...]
    ) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        place = np.digitize(values, edges) - 1
        place[np.isnan(values)] = -1
        for split, judged in self._splits():
            for k in range(len(edges) - 1):
                chosen = judged & (place == k)
                if chosen.any():
                    yield f"{name}/{split}/{k}", chosen

    def variograms(self) -> Iterator[tuple[str, Variogram]]:
        errors, predicted = self.predicted - self.reference, ~np.isnan(self.predicted)
        for split, judged in self._splits():
            if split in CORRELATED:
                yield split, Variogram.of(errors, judged & predicted)

    def _splits(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        known = ~np.isnan(self.reference)
        for split, use in USES.items():
            yield split, known & (self.use == use)
        yield "all", known

    def _stats(self, values: NDArray[np.float32], judged: NDArray[np.bool_]) -> Stats:
        return Stats.of(
            values, self.reference, reference_valid=judged, predicted_valid=~np.isnan(values)
        )


def _pixel(grid: Grid, region: Region) -> tuple[float, float]:
    return grid.part(region).pixel_metres()


def slope(height: NDArray[np.float32], dy: float, dx: float) -> NDArray[np.float32]:
    """Slope in degrees by Horn's 3 x 3 weighted differences, NaN where a neighbour is missing.

    Horn (1981), Hill shading and the reflectance map, doi:10.1109/PROC.1981.11918.

    Args:
        height: (rows + 2, columns + 2) metres, one pixel wider on every side than the result.
        dy: height of a pixel in metres.
        dx: width of a pixel in metres.
    """
    z = height.astype(np.float64)
    across = z[:-2] + 2 * z[1:-1] + z[2:]
    down = z[:, :-2] + 2 * z[:, 1:-1] + z[:, 2:]
    east = (across[:, 2:] - across[:, :-2]) / (8 * dx)
    south = (down[2:] - down[:-2]) / (8 * dy)
    return np.degrees(np.arctan(np.hypot(east, south))).astype(np.float32)


def _pack(
    sums: dict[str, Stats | Scatter],
    held: dict[str, Intervals],
    ground: _Ground,
    every: int,
    region: Region,
) -> bytes:
    """Sums and thinned maps as npz; the pixels taken are multiples of `every` on the whole grid."""
    rows = slice(-region.row % every, None, every)
    cols = slice(-region.col % every, None, every)
    arrays: dict[str, NDArray[Any]] = {
        "sums": np.frombuffer(dump(sums), dtype=np.uint8),
        "reference": ground.reference[rows, cols],
        "predicted": ground.predicted[rows, cols],
        "use": ground.use[rows, cols],
    }
    for split, sums_of_pairs in ground.variograms():
        arrays[variogram_key(split)] = np.stack([sums_of_pairs.pairs, sums_of_pairs.squares])
    for name, values in (("novelty", ground.novelty), ("spread", ground.spread)):
        if values is not None:
            arrays[name] = values[rows, cols]
    if held:
        arrays[INTERVALS] = np.stack([part.sums for part in held.values()])
        arrays[INTERVAL_KEYS] = np.array(list(held))
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
