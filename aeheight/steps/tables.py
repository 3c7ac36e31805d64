"""The tables of metrics.json, from the merged sums of all shards."""

from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import permutations
from operator import add
from typing import Any

from aeheight.correlation import Variogram
from aeheight.criteria import Criterion
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats
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
    """The metrics of a predictor on each split."""
    return {split: _summary(sums, f"{name}/{split}") for split in SPLITS}


def by_class(sums: Mapping[str, Any], criteria: Mapping[str, Criterion]) -> dict[str, Any]:
    """For each criterion its rows, of the classes that a split has."""
    return {name: list(_rows(sums, name, criterion)) for name, criterion in criteria.items()}


def _rows(sums: Mapping[str, Any], name: str, criterion: Criterion) -> Iterator[dict[str, Any]]:
    start = f"{name}/"
    numbers = sorted({int(key.rsplit("/", 1)[1]) for key in sums if key.startswith(start)})
    for split in SPLITS:
        for number in numbers:
            parts = PARTS if split == "all" and name != "zone" else (split,)
            keys = [f"{name}/{part}/{number}" for part in parts]
            if found := [sums[key] for key in keys if key in sums]:
                total = reduce(add, found)
                yield {"split": split, **criterion.label(number), **total.summary()}


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


def _summary(sums: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = sums[key]
    assert isinstance(part, Stats | Intervals)
    return part.summary()
