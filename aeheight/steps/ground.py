"""One shard of ground as evaluation sees it: the map, its reference, and what divides them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aeheight.blocks import Blocks
from aeheight.coregistration import Facets, terms
from aeheight.correlation import Variogram
from aeheight.counts import alike
from aeheight.criteria import REACH, Criterion, apart
from aeheight.crossings import MARGIN, Crossings
from aeheight.cube import Tree
from aeheight.grid import owned
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats
from aeheight.models import Checkpoint
from aeheight.relief import facing, gradient, roughness, steepness
from aeheight.sources import ClassMaps
from aeheight.splits import TEST, TRAIN, UNUSED, USES
from aeheight.template import Shard, Template
from aeheight.windows import Region

_Kind = TypeVar("_Kind", bound=np.generic)

PARTS = {**USES, "unused": UNUSED}
"""What all ground is made of: sums by class are kept for these, and "all" is their sum."""

CORRELATED = ("test", "all")
"""Grounds whose errors' correlation is summed up: the first that has pixels is shown."""


def tells(template: Template, name: str) -> bool:
    """Whether a tree has a layer."""
    return any(layer.name == name for layer in template.layers)


@dataclass(frozen=True)
class Ground:
    """One shard: all (rows, columns)."""

    around: NDArray[np.float32]
    """Reference heights, MARGIN pixels wider on every side; NaN where there is none."""
    mapped: NDArray[np.float32]
    """Predicted heights, as wide."""
    own: NDArray[np.bool_]
    """Which of that ground is judged here, as wide."""
    pixel: tuple[float, float]
    """Height and width of a pixel, metres."""
    use: NDArray[np.uint8]
    baselines: dict[str, NDArray[np.float32]]
    measures: dict[str, NDArray[np.float32] | NDArray[np.int64]]
    """What criteria are told by besides the heights: as `Criterion.classed` takes it."""
    novelty: NDArray[np.float32] | None
    """None: the map does not tell."""
    spread: NDArray[np.float32] | None
    """Likewise."""

    @classmethod
    def read(
        cls,
        cube: Tree,
        heights: Tree,
        checkpoint: Checkpoint,
        classes: ClassMaps,
        shard: Shard,
    ) -> "Ground":
        """Read all that a shard of the report is made from.

        Raises:
            OSError: a chunk or a file is damaged.
            InputError: a class raster is not what its header said.
        """
        group, region, year = shard.group, shard.region, shard.year
        grid, wide = cube.template.grid(group), region.expand(MARGIN)
        codes = cube.read(group, "embedding", year, region)
        ridge = checkpoint.ridge.predict(codes)
        baselines = {"mean": np.full_like(ridge, checkpoint.ridge.mean), "ridge": ridge}
        if checkpoint.kernel is not None:
            baselines["kernel"] = checkpoint.kernel.predict(codes)
        if tells(cube.template, "prior"):
            baselines["prior"] = cube.read(group, "prior", None, region)
        mapped = heights.read(group, "height", year, wide)
        for values in baselines.values():  # judged on the model's ground, to be comparable
            values[np.isnan(inner(mapped))] = np.nan
        use = cube.read(group, "split", None, region.expand(REACH))
        measures: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
            **classes.read(grid, region),
            "distance": apart(use == TRAIN),
        }
        return cls(
            cube.read(group, "height", None, wide),
            mapped,
            # Ground that two zones hold is judged in the one that it lies in.
            owned(cube.template.grids, grid, wide),
            grid.part(region).pixel_metres(),
            use[REACH:-REACH, REACH:-REACH],
            baselines,
            measures,
            *(
                heights.read(group, name, year, region) if tells(heights.template, name) else None
                for name in ("novelty", "spread")
            ),
        )

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        """Metres, NaN where there is none or it is judged elsewhere."""
        return np.where(inner(self.own), inner(self.around), np.float32(np.nan))

    @cached_property
    def predicted(self) -> NDArray[np.float32]:
        """Metres, NaN where there is none."""
        return inner(self.mapped)

    @cached_property
    def gradient(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rise of the reference to the east and to the north, NaN where a neighbour is missing."""
        return gradient(self.around[1:-1, 1:-1], *self.pixel)

    def measure(self, name: str) -> NDArray[np.float32] | NDArray[np.int64]:
        """What tells the classes of a criterion."""
        if name == "slope":
            return steepness(*self.gradient)
        if name == "aspect":
            return facing(*self.gradient)
        if name == "roughness":
            return roughness(self.around[1:-1, 1:-1])
        if name == "novelty":
            assert self.novelty is not None
            return self.novelty
        heights = {"height": self.reference, "predicted": self.predicted}
        return heights[name] if name in heights else self.measures[name]

    def tables(self) -> Iterator[tuple[str, Stats | Scatter]]:
        """Sums of the model, its baselines and the scatter on each split and on all ground."""
        predictors = {"model": self.predicted, **self.baselines}
        for split, judged in self.splits():
            reference = self.reference[judged]
            for name, values in predictors.items():
                found = values[judged]
                known = ~np.isnan(found)
                yield f"{name}/{split}", Stats.of(found, reference, predicted_valid=known)
                if name == "model":
                    yield f"scatter/{split}", Scatter.of(found, reference, predicted_valid=known)

    def classes(
        self, criteria: Mapping[str, Criterion]
    ) -> Iterator[tuple[str, Stats, Intervals | None]]:
        """Sums of the model on each class of each criterion, by the PARTS that ground is used for.

        Each pixel is sorted to its class once, whatever the number of classes.
        """
        known = ~np.isnan(self.reference)
        reference, predicted, use = self.reference[known], self.predicted[known], self.use[known]
        spread = None if self.spread is None else self.spread[known]
        uses = {number: name for name, number in PARTS.items()}
        for name, criterion in criteria.items():
            places = criterion.classed(self.measure(name))[known]
            order, parts = alike(np.where(places < 0, -1, places * len(uses) + use))
            r, p = reference[order], predicted[order]
            s = None if spread is None else spread[order]
            for number, part in parts:
                place, used = divmod(number, len(uses))
                key = f"{name}/{uses[used]}/{place}"
                stats = Stats.of(p[part], r[part], predicted_valid=~np.isnan(p[part]))
                held = None if s is None else _held(p[part] - r[part], s[part])
                yield key, stats, held

    def intervals(self) -> Iterator[tuple[str, Intervals]]:
        """What spreads hold on each split and on all ground."""
        if self.spread is None:
            return
        for split, judged in self.splits():
            errors = self.predicted[judged] - self.reference[judged]
            yield f"model/{split}", _held(errors, self.spread[judged])

    @cached_property
    def tests(self) -> NDArray[np.bool_]:
        """Test pixels with a reference and a prediction."""
        known = ~np.isnan(self.predicted) & ~np.isnan(self.reference)
        tests: NDArray[np.bool_] = known & (self.use == TEST)
        return tests

    def blocks(self, grid: int, region: Region, edge: int) -> Blocks:
        """Sums by block of test ground, `edge` pixels wide, of the grid of that number."""
        errors = self.predicted - self.reference
        east, north = (rise[self.tests] for rise in self.gradient)
        sums = terms((east, north), errors[self.tests])
        return Blocks.of((grid, region, edge), errors, self.reference, self.tests, sums)

    def facets(self) -> Facets:
        """Errors on test ground by aspect and slope."""
        return Facets.of(self.gradient, self.predicted - self.reference, self.tests)

    def crossings(self, region: Region, every: int) -> Crossings:
        """Steps of the errors at lines so many pixels apart."""
        errors = np.where(self.own, self.mapped - self.around, np.float32(np.nan))
        return Crossings.of(errors, region, every)

    def variograms(self) -> Iterator[tuple[str, Variogram]]:
        """How far errors go together, on the CORRELATED grounds."""
        errors, predicted = self.predicted - self.reference, ~np.isnan(self.predicted)
        for split, judged in self.splits():
            if split in CORRELATED:
                yield split, Variogram.of(errors, judged & predicted)

    def pictures(self, region: Region, every: int) -> dict[str, NDArray[Any]]:
        """Thinned maps: the pixels taken are multiples of `every` on the whole grid."""
        rows = slice(-region.row % every, None, every)
        cols = slice(-region.col % every, None, every)
        layers: dict[str, NDArray[Any] | None] = {
            "reference": self.reference,
            "predicted": self.predicted,
            "use": self.use,
            "novelty": self.novelty,
            "spread": self.spread,
        }
        return {name: v[rows, cols] for name, v in layers.items() if v is not None}

    def splits(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """The pixels with a reference of each split and of all ground."""
        known = ~np.isnan(self.reference)
        for split, use in USES.items():
            yield split, known & (self.use == use)
        yield "all", known


def inner(values: NDArray[_Kind]) -> NDArray[_Kind]:
    """A shard without the MARGIN about it."""
    return values[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _held(errors: NDArray[np.float32], spread: NDArray[np.float32]) -> Intervals:
    known = ~np.isnan(spread)
    return Intervals.of(errors[known], spread[known])
