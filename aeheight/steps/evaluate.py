"""Evaluate: the sums of every shard, one a task; merged once, they make the report."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from aeheight.cluster import Outcome
from aeheight.correlation import LAGS
from aeheight.criteria import DISTANCES, NOVELTIES, ROUGHNESSES, SLOPES, Criterion
from aeheight.crossings import MARGIN
from aeheight.cube import Tree, checksum, find, open_tree
from aeheight.errors import InputError, NotYetError
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats
from aeheight.models import Checkpoint, Provenance
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.relief import SECTORS
from aeheight.settings import fingerprint
from aeheight.sources import ClassMaps
from aeheight.steps.edges import compare, facing, opposite
from aeheight.steps.ground import Ground, tells
from aeheight.steps.parts import CLASSES, Part, part_key, thin
from aeheight.steps.predict import MODEL
from aeheight.steps.run import Made, Plan, Run, carry_out
from aeheight.steps.split import check_split, record_split, split_fingerprint
from aeheight.steps.summary import is_made_from, summarise
from aeheight.store import Store
from aeheight.template import Shard, Template
from aeheight.windows import Lattice

_LIBRARIES = 1_500_000_000
"""Bytes of a worker before it reads: torch and the compiled loops above all."""
_PIXEL_BYTES = 300
"""Of a shard's pixel: two shards are at hand, of 120 bytes a pixel and some."""


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
    maps_of_classes = ClassMaps.scan(run.settings, cube.grids)
    shards = _shards(run, cube, heights, maps_of_classes, year)
    floats = sum(layer.dtype == "float32" for layer in cube.layers)
    floats += sum(tells(heights, name) for name in ("novelty", "spread"))
    per_pixel = 64 + 4 * floats + 5
    return Plan(
        "evaluate",
        {
            "year": year,
            "shards": len(shards),
            "pending": run.left("report", shards),
            "bytes_to_read": per_pixel * sum(shard.region.size for shard in shards),
            "peak_worker_bytes": _LIBRARIES + cube.cut.shard**2 * _PIXEL_BYTES,
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


def _shards(
    run: Run, cube: Template, heights: Template, classes: ClassMaps, year: int
) -> list[Shard]:
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
                below.inputs(shard.group, read, shard.region.expand(MARGIN))
                + above.inputs(shard.group, {"height": year}, shard.region.expand(MARGIN))
                + _across(above, cube, shard, year)
                + classes.inputs(cube.grid(shard.group), shard)
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
    split = record_split(run)
    heights = open_tree(run.heights)
    year = _judged_year(cube.template, checkpoint)
    classes = ClassMaps.scan(run.settings, cube.template.grids)
    criteria = _criteria(run, cube, heights.template, checkpoint)
    recorded = {f"{name}_classes": one.recorded() for name, one in criteria.items()}
    recorded["correlation_lags"] = list(LAGS)
    recorded["block"] = run.settings.evaluate.block or run.settings.split.block
    lines = _lines(run, heights.template)
    settings = {
        "heights": heights.identity,
        "checkpoint": checkpoint.digest,
        "cube": cube.identity,
        "split": split,
        "year": year,
        **recorded,
    }
    found = ledger.settings()
    if found is not None and _judged(found) == _judged(settings) and found != settings:
        ledger.discard()  # other classes, such as those of later heights: sums are made again
    ledger = ledger.begin(settings)
    named = classes.to_bytes()
    if not ledger.store.exists(CLASSES) or ledger.store.read(CLASSES) != named:
        ledger.store.write(CLASSES, named)
    task = SumUp(
        cube.store.uri,
        heights.store.uri,
        heights.identity,
        f"{cube.version} {heights.version}",
        run.ledger("heights").store.uri,
        ledger.store.uri,
        ledger.key,
        fingerprint(named.decode()),
        tuple(criteria.items()),
        recorded["block"],
        tuple(lines.items()),
    )
    shards = _shards(run, cube.template, heights.template, classes, year)
    made_from = fingerprint(
        [ledger.key, run.settings.model_dump(mode="json"), named.decode()]
        + [[shard.name, shard.inputs] for shard in shards]
    )
    fresh = is_made_from(run.report, made_from)
    outcome = carry_out(run, "evaluate", ledger, shards, task)
    if not outcome.failed and (outcome.done or not fresh):
        summarise(
            run, cube.template, heights.template, year, shards, checkpoint,
            criteria | {"zone": _zones(cube.template)}, lines, made_from,
        )  # fmt: skip
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


def _judged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings says which map is judged on what, whatever the tables."""
    return {name: settings.get(name) for name in ("heights", "checkpoint", "cube", "split", "year")}


def _criteria(
    run: Run, cube: Tree, heights: Template, checkpoint: Checkpoint
) -> dict[str, Criterion]:
    """What shards divide their ground by."""
    edges = _height_edges(run, cube.template)
    criteria = {
        "slope": Criterion(SLOPES),
        "height": Criterion(edges),
        "predicted": Criterion((-np.inf, *edges, np.inf)),
        "aspect": Criterion(names=dict(enumerate(SECTORS))),
        "roughness": Criterion(ROUGHNESSES),
    }
    if checkpoint.provenance.cube == cube.identity:  # else its training ground is elsewhere
        criteria["distance"] = Criterion(DISTANCES)
    if tells(heights, "novelty"):
        criteria["novelty"] = Criterion(NOVELTIES)
    return criteria | {
        name: Criterion(names=wanted.names)
        for name, wanted in run.settings.evaluate.classes.items()
    }


def _lines(run: Run, heights: Template) -> dict[str, int]:
    """Pixels from one seam of the map to the next, of its windows and of its shards."""
    made = (run.ledger("heights").settings() or {}).get("predict") or {}
    lines = {"shards": heights.cut.shard}
    if made.get("window") is not None and made.get("halo") is not None:
        blend = made.get("blend") or 0
        lines["windows"] = Lattice((1, 1), made["window"], made["halo"], blend).stride
    return lines


def _zones(cube: Template) -> Criterion:
    return Criterion(names={k: grid.name for k, grid in enumerate(cube.grids)})


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
    classes: str
    """Fingerprint of the class rasters' headers."""
    criteria: tuple[tuple[str, Criterion], ...]
    block: int
    """Edge of the blocks of the bootstrap, pixels."""
    lines: tuple[tuple[str, int], ...]
    """Names of seams, and pixels from one to the next."""

    def __call__(self, shard: Shard) -> Receipt:
        """Read, sum up, store the sums, leave the receipt."""
        started = time.monotonic()
        cube, heights, checkpoint = _opened(
            self.cube, self.heights, self.identity, self.version, self.heights_ledger
        )
        ledger = Ledger(Store(self.ledger))
        classes = _classes(self.ledger, self.classes)
        ground = Ground.read(cube, heights, checkpoint, classes, shard)
        part = self._part(ground, cube.template, heights, shard)
        data = part.to_bytes()
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

    def _part(self, ground: Ground, cube: Template, heights: Tree, shard: Shard) -> Part:
        sums: dict[str, Stats | Scatter] = dict(ground.tables())
        held: dict[str, Intervals] = dict(ground.intervals())
        for key, stats, intervals in ground.classes(dict(self.criteria)):
            sums[key] = stats
            if intervals is not None:
                held[key] = intervals
        assert shard.year is not None
        sums |= compare(heights, shard.group, shard.year, shard.region, ground.predicted)
        number = [grid.name for grid in cube.grids].index(shard.group)
        return Part(
            sums,
            held,
            dict(ground.variograms()),
            ground.pictures(shard.region, thin(cube.grids[number].shape)),
            ground.blocks(number, shard.region, self.block),
            ground.facets(),
            {name: ground.crossings(shard.region, every) for name, every in self.lines},
        )


@lru_cache(maxsize=2)
def _opened(
    cube: str, heights: str, _identity: str, _version: str, ledger: str
) -> tuple[Tree, Tree, Checkpoint]:
    checkpoint = Checkpoint.from_bytes(Store(ledger).read(MODEL))
    return open_tree(Store(cube)), open_tree(Store(heights)), checkpoint


@lru_cache(maxsize=2)
def _classes(ledger: str, _digest: str) -> ClassMaps:
    return ClassMaps.from_bytes(Store(ledger).read(CLASSES))
