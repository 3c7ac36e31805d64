"""The tables of metrics.json, from the merged sums of all shards."""

from collections.abc import Collection, Iterator, Mapping
from functools import reduce
from itertools import permutations
from math import ceil
from operator import add
from typing import Any

from aeheight.blocks import Blocks
from aeheight.charts import Histogram
from aeheight.confidence import FEW, LEVEL, METRICS, draw, interval, resampled
from aeheight.coregistration import Facets, coregister
from aeheight.correlation import Variogram
from aeheight.criteria import Criterion
from aeheight.crossings import Crossings
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats, comparable
from aeheight.settings import RegionSettings
from aeheight.shift import Heights
from aeheight.splits import USES
from aeheight.steps.edges import pair_key
from aeheight.steps.ground import CORRELATED, PARTS
from aeheight.template import Template

SPLITS = (*USES, "all")

_OF_A_REFERENCE = ("coverage", "r2", "pearson")
"""Metrics that say nothing of two predictions."""

Sums = Mapping[str, Stats | Scatter]


def by_split(sums: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metrics of a predictor on each split; where it was not judged, those of no pixels."""
    nothing = {f"{name}/{split}": Stats.zero() for split in SPLITS}
    return {split: _summary({**nothing, **sums}, f"{name}/{split}") for split in SPLITS}


def by_class(
    sums: Mapping[str, Any], criteria: Mapping[str, Criterion], asked: Collection[str] = ()
) -> dict[str, Any]:
    """For each criterion its rows, of the classes that a split has.

    Args:
        sums: by name.
        criteria: by name.
        asked: criteria that a user gave: a class that has a name has a row, be it of no pixels.
    """
    return {
        name: list(_rows(sums, name, criterion, asked=name in asked))
        for name, criterion in criteria.items()
    }


def _rows(
    sums: Mapping[str, Any], name: str, criterion: Criterion, *, asked: bool
) -> Iterator[dict[str, Any]]:
    start = f"{name}/"
    numbers = {int(key.rsplit("/", 1)[1]) for key in sums if key.startswith(start)}
    for split in SPLITS:
        for number in sorted(numbers | (criterion.names.keys() if asked else set())):
            parts = PARTS if split == "all" and name != "zone" else (split,)
            keys = [f"{name}/{part}/{number}" for part in parts]
            if found := [sums[key] for key in keys if key in sums]:
                total = reduce(add, found)
                yield {"split": split, **criterion.label(number), **total.summary()}
            elif asked and number in criterion.names:
                yield {"split": split, **criterion.label(number), **Stats.zero().summary()}


def of_zone(sums: Sums, number: int) -> dict[str, Stats]:
    """The sums of one shard of a zone as those of a class of the criterion `zone`."""
    tables = ((split, sums[f"model/{split}"]) for split in SPLITS)
    return {
        f"zone/{split}/{number}": part
        for split, part in tables
        if isinstance(part, Stats) and part.n_reference
    }


def intervals(held: Mapping[str, Intervals], criteria: Mapping[str, Criterion]) -> dict[str, Any]:
    """As "model" and "by", of the map's intervals; empty where the map does not tell its spread."""
    if not held:
        return {}
    return {"model": by_split(held, "model"), "by": by_class(held, criteria)}


def calibration(held: Mapping[str, Intervals], split: str) -> Histogram | None:
    """Edges (k + 1,) of |d| / spread and counts (k,) on a split; the last are all from 8 on.

    None where the map does not tell its spread.
    """
    if f"model/{split}" not in held:
        return None
    return held[f"model/{split}"].calibration()


def zones(cube: Template, sums: Sums) -> Iterator[dict[str, Any]]:
    """One row a pair of zones whose predictions meet; neither of them is a reference."""
    for first, second in permutations([grid.name for grid in cube.grids], 2):
        key = pair_key(first, second)
        if key in sums:
            kept = {k: v for k, v in _summary(sums, key).items() if k not in _OF_A_REFERENCE}
            yield {"between": [first, second], **kept}


def judged_heights(sums: Sums) -> dict[str, Heights]:
    """The reference heights of each split, where there are predictions."""
    found = {}
    for split in USES:
        scatter = sums[f"scatter/{split}"]
        assert isinstance(scatter, Scatter)
        found[split] = Heights.judged(scatter)
    return found


def correlation(
    variograms: Mapping[str, Variogram], sums: Sums, cube: Template, buffer: int | None
) -> dict[str, Any]:
    """How far errors go together on test ground, or on all of it where none tests."""
    ground = next((s for s in CORRELATED if variograms[s].pairs.any()), CORRELATED[-1])
    stats = sums[f"model/{ground}"]
    assert isinstance(stats, Stats)
    sill = stats.m2_difference / max(stats.n, 1)
    metres = sum(cube.grids[0].pixel_metres()) / 2
    return {"ground": ground, **variograms[ground].summary(sill, metres, buffer)}


def skill(
    model: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """By split: 1 - MSE / MSE of each baseline.

    Murphy (1988), Skill scores based on the mean square error,
    doi:10.1175/1520-0493(1988)116<2417:SSBOTM>2.0.CO;2.

    None where either is undefined or the baseline's is 0, or where they were judged on pixels whose
    numbers differ by more than 1 %.
    """
    return {
        split: {name: _skill(row, table[split]) for name, table in baselines.items()}
        for split, row in model.items()
    }


def _skill(row: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    if not row["rmse"] or not other["rmse"] or not comparable(row, other):
        return None
    return float(1 - (row["rmse"] / other["rmse"]) ** 2)


def regression(sums: Sums) -> dict[str, dict[str, float | None]]:
    """By split: the least-squares line of the prediction on the reference, and the other way.

    `slope` and `intercept_m` of predicted = intercept + slope * reference: a slope below 1 pulls
    heights towards their mean. `slope_of_reference` is that of the reference on the prediction: 1
    where a prediction is right on average whatever it says.
    """
    return {split: _line(sums[f"model/{split}"]) for split in SPLITS}


def _line(stats: Stats | Scatter) -> dict[str, float | None]:
    assert isinstance(stats, Stats)
    slope, other = (
        stats.comoment / spread if spread > 0 else None
        for spread in (stats.m2_reference, stats.m2_predicted)
    )
    start = None if slope is None else stats.mean_predicted - slope * stats.mean_reference
    return {"slope": slope, "intercept_m": start, "slope_of_reference": other}


def chosen_blocks(
    blocks: Blocks | None, settings: RegionSettings, reach: Mapping[str, Any]
) -> Blocks | None:
    """The blocks of a bootstrap, as wide as errors go together over unless a width was asked for.

    None without test ground.
    """
    if blocks is None or not len(blocks.keys):
        return None
    if settings.evaluate.block is not None:
        return blocks
    wanted = reach["length_px"] if reach["length_px"] is not None else reach["farthest_px"]
    return blocks.joined(max(ceil((wanted or 0) / (settings.split.block * blocks.scale)), 1))


def confidence(blocks: Blocks | None, settings: RegionSettings, sums: Sums) -> dict[str, Any]:
    """What a block bootstrap says of the metrics of test ground; empty without any."""
    stats = sums["model/test"]
    assert isinstance(stats, Stats)
    if blocks is None or stats.n == 0:
        return {}
    wanted, count = settings.evaluate, len(blocks.keys)
    told, width = stats.summary(), None
    found: dict[str, tuple[float | None, float | None]] = dict.fromkeys(METRICS, (None, None))
    if count > 1:
        drawn, width = resampled(blocks, draw(count, wanted.draws, wanted.seed))
        found |= {name: interval(drawn[name]) for name in METRICS}
    return {
        "split": "test",
        "level": LEVEL,
        "blocks": count,
        "block_px": blocks.scale * (wanted.block or settings.split.block),
        "few": count < FEW,
        "draws": wanted.draws,
        "seed": wanted.seed,
        "bin_m": width,
        "metrics": {
            name: {"value": told[name], "lo": found[name][0], "hi": found[name][1]}
            for name in METRICS
        },
    }


def coregistration(blocks: Blocks | None, facets: Facets) -> dict[str, Any]:
    """How far the map lies beside its reference, from test ground; empty without any."""
    return {} if blocks is None else {"split": "test", **coregister(blocks, facets)}


def seams(crossings: Mapping[str, Crossings], lines: Mapping[str, int]) -> dict[str, Any]:
    """Steps of the errors at each kind of seam that lies on judged ground."""
    told = {name: crossings[name].summary() for name in lines if name in crossings}
    return {name: {"every_px": lines[name], **row} for name, row in told.items() if row}


def _summary(sums: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = sums[key]
    assert isinstance(part, Stats | Intervals)
    return part.summary()
