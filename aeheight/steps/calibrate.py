"""Calibrate: a finished map and sparse reference heights to a corrected map, one shard a task.

The map stays as it is; the corrected one lies beside it, in `calibrated.zarr`, with all its layers.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.calibration import calibrate
from aeheight.cluster import Outcome
from aeheight.correction import Correction
from aeheight.cube import Tree, create, find, open_tree, remove_tree
from aeheight.errors import InputError, NotYetError
from aeheight.fitting import Samples
from aeheight.grid import reproject_bounds, transformer
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger, Receipt, receipt_for, versions
from aeheight.settings import fingerprint
from aeheight.sources.points import Points, read_points
from aeheight.spread import LEVEL
from aeheight.steps.places import DEGREES, map_at, pixels_on, plane_of, probes
from aeheight.steps.predict import MODEL
from aeheight.steps.run import Plan, Run, carry_out
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template

TREE, LEDGER, FOLDER = "calibrated.zarr", "calibrated", "calibration"
"""Under the run's store: the corrected map, its receipts, and what the correction is."""
RESULT = "calibration.json"
_FORMAT = 1
_DEVIATIONS = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Half a normal error's interval of the spread's level, in standard deviations."""
_MOST = 10_000
"""Points that a correction is fitted to: more would not move it, and take minutes."""


def plan(run: Run, href: str) -> Plan:
    """What calibrate would do. The map is read at the points, since they decide whether it does.

    Args:
        run: with a finished map.
        href: the points, see `read_points`.

    Raises:
        InputError: see `execute`.
    """
    work = _Work.of(run, href)
    shards = work.template.shards("height")
    pixels = len(work.template.layers) * sum(shard.region.size for shard in shards)
    return Plan(
        "calibrate",
        {
            **summary(work.result),
            "shards": len(shards),
            "pending": run.left(LEDGER, shards),
            "bytes_to_read": 4 * pixels,
            "bytes_to_write": 4 * pixels,
            "peak_worker_bytes": 300_000_000 + work.template.cut.shard**2 * 120,
        },
    )


def execute(run: Run, href: str) -> tuple[Outcome, dict[str, Any]]:
    """Correct every pending shard of the map; nothing is written where that is not worth it.

    Args:
        run: with a finished map.
        href: the points, see `read_points`.

    Returns:
        What came of the shards, and what calibration.json holds.

    Raises:
        InputError: the map is not whole; points that cannot be used (see `read_points`) or prove no
            gain (see `calibrate`); or other points or another map than those it began with.
    """
    work = _Work.of(run, href)
    ledger, place = run.ledger(LEDGER), run.store.child(FOLDER)
    if run.options.overwrite:
        run.discard(ledger.store, place)
        remove_tree(run.store.child(TREE))
    tree = create(run.store.child(TREE), work.template)
    ledger = ledger.begin(work.result["made_of"] | {"calibrated": tree.identity})
    place.write(RESULT, json.dumps(work.result, indent=1, allow_nan=False).encode())
    return _apply(run, work.heights, tree, ledger), work.result


def repair(run: Run) -> Outcome:
    """Correct pending shards once more, with the correction that the others had.

    Raises:
        InputError: the map is not whole, or another than that was corrected.
    """
    heights, ledger = _whole_map(run), run.ledger(LEDGER)
    ledger.check(_of_map(run, heights), "calibrate")
    tree = open_tree(run.store.child(TREE))
    return _apply(run, heights, tree, ledger.current())


def _apply(run: Run, heights: Tree, tree: Tree, ledger: Ledger) -> Outcome:
    task = Calibrate(
        heights.store.uri,
        tree.store.uri,
        run.store.child(FOLDER).uri,
        f"{heights.version} {tree.version} {tree.identity}",
        ledger.store.uri,
        ledger.key,
    )
    return carry_out(run, "calibrate", ledger, tree.template.shards("height"), task)


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a person wants to know of calibration.json, in the order of printing."""
    points, trial = result["points"], result["trial"]
    before, after = trial["before"], trial["after"]
    dropped = ", ".join(f"{count} {why}" for why, count in points["dropped"].items())
    return {
        "points": f"{before['n']} of {points['rows']}" + f" ({dropped})" * bool(dropped),
        "correction": trial["form"],
        "proven_on": f"{trial['folds']} folds of {trial['blocks']} blocks of "
        f"{trial['block_metres']:.0f} m, each unseen",
        "RMSE": f"{before['rmse']:.2f} -> {after['rmse']:.2f} m, a gain of "
        f"{trial['gain_rmse']:.2f} ± {trial['gain_rmse_error']:.2f} m",
        "NMAD": f"{before['nmad']:.2f} -> {after['nmad']:.2f} m, a gain of "
        f"{trial['gain_nmad']:.2f} ± {trial['gain_nmad_error']:.2f} m",
        "median": f"{before['median']:.2f} -> {after['median']:.2f} m",
        **_spread_holds(trial),
        "near_points": f"{100 * trial['coverage']:.0f} % of the map; what is far stays as it is",
    }


def _spread_holds(trial: Mapping[str, Any]) -> dict[str, str]:
    """What the interval of the spread holds, where the map has one and this was told."""
    before, after = trial.get("within_before"), trial.get("within_after")
    if before is None or after is None:
        return {}
    return {
        "spread": f"holds {100 * before:.0f} -> {100 * after:.0f} % of the points, and should hold "
        f"{100 * LEVEL:.0f} %; it stays as it is"
    }


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be corrected, by what."""

    heights: Tree
    template: Template
    """Of the corrected map."""
    result: dict[str, Any]
    """What calibration.json holds."""

    @classmethod
    def of(cls, run: Run, href: str) -> "_Work":
        """Of a run, checked; a correction that was begun with is taken up."""
        heights, ledger = _whole_map(run), run.ledger(LEDGER)
        points = _points(heights.template, href)
        made_of = _of_map(run, heights) | {"points": {"digest": points.digest, "rows": points.rows}}
        result = None
        if not run.options.overwrite:
            ledger.check(made_of, "calibrate")
            result = _begun(run, made_of)
        if result is None:
            result = _proven(run, heights, points, href) | {"made_of": made_of}
        return cls(heights, _template(heights.template, result["correction"]), result)


def _whole_map(run: Run) -> Tree:
    """The map, with every shard in it.

    Raises:
        NotYetError: there is none yet, or shards of it are missing.
    """
    if find(run.heights) is None:
        raise NotYetError(f"there is no map at {run.heights.uri} yet; run aeheight predict")
    tree = open_tree(run.heights)
    if left := run.ledger("heights").pending(tree.template.shards("height")):
        raise NotYetError(f"{len(left)} shards of the map are missing; run aeheight predict")
    return tree


def _of_map(run: Run, heights: Tree) -> dict[str, Any]:
    """The map that a correction is made of, with what its shards were made from."""
    return {
        "heights": heights.identity,
        "map": fingerprint(sorted(run.ledger("heights").done().items())),
    }


def _points(template: Template, href: str) -> Points:
    """The points on the map's ground, in its vertical datum."""
    about = template.layer("height").attributes
    boxes = [reproject_bounds(grid.bounds, grid.crs, DEGREES) for grid in template.grids]
    return read_points(href, boxes, about["vertical_datum"], about["surface"], _MOST)


def _begun(run: Run, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that is there, if it was made of the same: a fit elsewhere may differ by a bit."""
    place = run.store.child(FOLDER)
    if not place.exists(RESULT):
        return None
    found = place.read_json(RESULT)
    return found if (found.get("format"), found.get("made_of")) == (_FORMAT, made_of) else None


def _proven(run: Run, heights: Tree, points: Points, href: str) -> dict[str, Any]:
    """The correction and its figures.

    Raises:
        InputError: it cannot be proven to help.
    """
    template, plane = heights.template, plane_of(heights.template.grids)
    year = _judged_year(run, template)
    predicted = map_at(heights, year, points.lon, points.lat)
    known = ~np.isnan(predicted)
    x, y = transformer(DEGREES, plane).transform(points.lon[known], points.lat[known])
    wanted = points.height[known] - predicted[known]
    samples = Samples(x, y, predicted[known], wanted, points.sigma[known])
    dropped = dict(points.dropped)
    if not known.all():
        dropped["where the map has no height"] = int((~known).sum())
    ground = probes(heights, year, plane)
    if not len(ground[0]):
        ground = x, y
    try:
        correction, trial = calibrate(samples, *ground, _allowed(heights, year, points, known))
    except InputError as error:
        told = ", ".join(f"{count} {why}" for why, count in dropped.items()) or "none"
        raise InputError(f"{href}: {error}\n  dropped, of {points.rows} points: {told}") from error
    if trial.outliers:
        why = f"outliers, over {trial.outlier_metres:.1f} m off what others of their height say"
        dropped[why] = trial.outliers
    about = template.layer("height").attributes
    return {
        "format": _FORMAT,
        "points": {
            "file": href,
            "rows": points.rows,
            "dropped": dropped,
            "datums": dict(points.datums),
            "converted": [asdict(shift) for shift in points.shifts],
        },
        "map": {"year": year, **{key: about[key] for key in ("surface", "vertical_datum")}},
        "trial": asdict(trial) | {"form": str(trial.form)},
        "plane": plane,
        "correction": correction.describe(),
        "versions": versions(),
    }


def _allowed(
    heights: Tree, year: int, points: Points, known: NDArray[np.bool_]
) -> NDArray[np.float64] | None:
    """(n,) how far off a map promises some points to be at most, metres; None: it tells no spread.

    A point errs too: its own interval of the same level adds to the spread in quadrature, as
    independent normal errors do.
    """
    if not any(layer.name == "spread" for layer in heights.template.layers):
        return None
    spread = map_at(heights, year, points.lon[known], points.lat[known], "spread")
    return np.hypot(spread, _DEVIATIONS * points.sigma[known])


def _judged_year(run: Run, template: Template) -> int:
    """The first year that the model was trained on, else the first: points carry no year."""
    checkpoint = Checkpoint.from_bytes(run.ledger("heights").store.read(MODEL))
    known = [year for year in template.years if year in checkpoint.provenance.years]
    return (known or template.years)[0]


def _template(heights: Template, correction: Mapping[str, Any]) -> Template:
    """The corrected map: all layers of the map, as they are but for the heights."""
    about = {
        "long_name": "predicted height, corrected by reference heights",
        "calibration": fingerprint(correction),
    }
    height = heights.layer("height")
    corrected = replace(height, attributes={**height.attributes, **about})
    others = tuple(_of_before(layer) for layer in heights.layers if layer.name != "height")
    title = heights.title.replace("heights", "calibrated heights", 1)
    return replace(heights, layers=(corrected, *others), title=title)


def _of_before(layer: Layer) -> Layer:
    """A layer that is carried over; a spread says which heights it is of."""
    if layer.name != "spread":
        return layer
    named = f"{layer.attributes.get('long_name', 'spread')}, of the heights before the correction"
    return replace(layer, attributes={**layer.attributes, "long_name": named})


@dataclass(frozen=True, slots=True)
class Calibrate:
    """Makes one shard of the corrected map; travels to workers as these few words."""

    heights: str
    calibrated: str
    folder: str
    """Where calibration.json lies."""
    version: str
    """Of both trees."""
    ledger: str
    key: str

    def __call__(self, shard: Shard) -> Receipt:
        """Read, correct, write, leave the receipt."""
        started = time.monotonic()
        heights, tree, plane, correction = _opened(self)
        values = heights.read(shard.group, "height", shard.year, shard.region)
        x, y = pixels_on(tree.template.grid(shard.group), shard.region, plane)
        corrected = (values + correction.at(x, y, values.astype(np.float64))).astype(np.float32)
        further = dict(self._carried(heights, tree, shard))
        digest = tree.write(shard, corrected)
        valid = ~np.isnan(corrected)
        receipt = receipt_for(shard, corrected, digest, valid, self.key, started)
        receipt = replace(receipt, further=further)
        Ledger(Store(self.ledger)).leave(receipt)
        return receipt

    def _carried(self, heights: Tree, tree: Tree, shard: Shard) -> Iterator[tuple[str, str]]:
        """Name and checksum of the layers that stay as they are, once written."""
        for layer in tree.template.layers:
            if layer.name != "height":
                values = heights.read(shard.group, layer.name, shard.year, shard.region)
                yield layer.name, tree.write(replace(shard, layer=layer.name), values)


@lru_cache(maxsize=2)
def _opened(task: Calibrate) -> tuple[Tree, Tree, str, Correction]:
    found = Store(task.folder).read_json(RESULT)
    trees = open_tree(Store(task.heights)), open_tree(Store(task.calibrated))
    return *trees, found["plane"], Correction.described(found["correction"])
