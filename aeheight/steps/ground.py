"""One shard of ground as evaluation sees it: the map, its reference, and what divides them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aeheight.blocks import Blocks
from aeheight.coregistration import Facets, terms
from aeheight.correlation import Variogram
from aeheight.counts import numbered
from aeheight.criteria import REACH, Criterion, apart
from aeheight.crossings import MARGIN, Crossings
from aeheight.cube import Tree
from aeheight.errors import InputError
from aeheight.grid import owned
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats
from aeheight.models import Checkpoint
from aeheight.relief import facing, gradient, roughness, steepness
from aeheight.sources import ClassMaps
from aeheight.splits import TEST, TRAIN, UNUSED, USES, VALIDATION
from aeheight.template import Shard, Template
from aeheight.windows import Region

_Kind = TypeVar("_Kind", bound=np.generic)

PARTS = {**USES, "unused": UNUSED}
"""What all ground is made of: sums by class are kept for these, and "all" is their sum."""

HELD_OUT = (VALIDATION, TEST)
"""Where a kernel regression is judged: it takes 60 times as long as a ridge, and between the pixels
that it was fitted to it says little."""

_MOST = 4000
"""Classes and uses of one shard that can be told apart."""

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
    pixel: tuple[float, NDArray[np.float64]]
    """Height of a pixel, and its width in each row (rows, 1), metres."""
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
        here = grid.part(region)
        codes = cube.read(group, "embedding", year, region)
        ridge = checkpoint.ridge.predict(codes)
        use = cube.read(group, "split", None, region.expand(REACH))
        baselines = {"mean": np.full_like(ridge, checkpoint.ridge.mean), "ridge": ridge}
        if checkpoint.kernel is not None:
            held_out = np.isin(inner(use, REACH), HELD_OUT)
            baselines["kernel"] = np.full_like(ridge, np.nan)
            baselines["kernel"][held_out] = checkpoint.kernel.predict(codes[:, held_out])
        if tells(cube.template, "prior"):
            baselines["prior"] = cube.read(group, "prior", None, region)
        mapped = heights.read(group, "height", year, wide)
        for values in baselines.values():  # judged on the model's ground, to be comparable
            values[np.isnan(inner(mapped))] = np.nan
        measures: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
            **classes.read(grid, region),
            "distance": apart(use == TRAIN),
        }
        return cls(
            cube.read(group, "height", None, wide),
            mapped,
            # Ground that two zones hold is judged in the one that it lies in.
            owned(cube.template.grids, grid, wide),
            (here.pixel_metres()[0], here.pixel_widths()),
            inner(use, REACH),
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
    def known(self) -> NDArray[np.bool_]:
        """Pixels that have a reference and are judged here."""
        return ~np.isnan(self.reference)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """The use of each such pixel as PARTS number it, -1 for the others."""
        return np.where(self.known, self.use.astype(np.int32), np.int32(-1))

    @cached_property
    def errors(self) -> NDArray[np.float32]:
        """Predicted less reference, metres; NaN where one is missing."""
        return self.predicted - self.reference

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
        for name, values in ({"model": self.predicted} | self.baselines).items():
            parts = Stats.by(values, self.reference, self.labels, len(PARTS))
            for split, use in USES.items():
                if name != "kernel" or use in HELD_OUT:
                    yield f"{name}/{split}", parts[use]
            if name != "kernel":
                yield f"{name}/all", sum(parts, Stats.zero())
        predicted, everywhere = ~np.isnan(self.predicted), Scatter.zero()
        for part, use in PARTS.items():
            there = predicted & (self.labels == use)
            scatter = Scatter.of(self.predicted[there], self.reference[there])
            everywhere += scatter
            if part in USES:
                yield f"scatter/{part}", scatter
        yield "scatter/all", everywhere

    def classes(
        self, criteria: Mapping[str, Criterion]
    ) -> Iterator[tuple[str, Stats, Intervals | None]]:
        """Sums of the model on each class of each criterion, by the PARTS that ground is used for.

        All criteria are summed up in one pass over the pixels.
        """
        uses = {number: name for name, number in PARTS.items()}
        keys: list[str] = []
        labels = np.empty((len(criteria), *self.reference.shape), np.int32)
        for label, (name, criterion) in zip(labels, criteria.items(), strict=True):
            places = criterion.classed(self.measure(name))
            judged = self.known & (places >= 0)
            found, numbers = numbered(np.where(judged, places * len(uses) + self.labels, -1))
            if len(found) > _MOST:
                raise InputError(
                    f"{name}: {len(found)} classes in one shard, at most {_MOST} can be told "
                    "apart; give a raster of classes, not of measures"
                )
            label[...] = np.where(judged, numbers + len(keys), -1)
            keys += [f"{name}/{uses[n % len(uses)]}/{n // len(uses)}" for n in found]
        stats = Stats.by(self.predicted, self.reference, labels, len(keys))
        held: Sequence[Intervals | None] = [None] * len(keys)
        if self.spread is not None:
            held = Intervals.by(self.errors, self.spread, labels, len(keys))
        for key, its_stats, its_held in zip(keys, stats, held, strict=True):
            if its_stats.n_reference:
                yield key, its_stats, its_held

    def intervals(self) -> Iterator[tuple[str, Intervals]]:
        """What spreads hold on each split and on all ground."""
        if self.spread is None:
            return
        parts = Intervals.by(self.errors, self.spread, self.labels, len(PARTS))
        for split, use in USES.items():
            yield f"model/{split}", parts[use]
        yield "model/all", sum(parts, Intervals.zero())

    @cached_property
    def tests(self) -> NDArray[np.bool_]:
        """Test pixels with a reference and a prediction."""
        tests: NDArray[np.bool_] = ~np.isnan(self.errors) & (self.use == TEST)
        return tests

    def blocks(self, grid: int, region: Region, edge: int) -> Blocks:
        """Sums by block of test ground, `edge` pixels wide, of the grid of that number."""
        east, north = (rise[self.tests] for rise in self.gradient)
        sums = terms((east, north), self.errors[self.tests])
        return Blocks.of((grid, region, edge), self.errors, self.reference, self.tests, sums)

    def facets(self) -> Facets:
        """Errors on test ground by aspect and slope."""
        return Facets.of(self.gradient, self.errors, self.tests)

    def crossings(self, region: Region, every: int) -> Crossings:
        """Steps of the errors at lines so many pixels apart."""
        errors = np.where(self.own, self.mapped - self.around, np.float32(np.nan))
        return Crossings.of(errors, region, every)

    def variograms(self) -> Iterator[tuple[str, Variogram]]:
        """How far errors go together, on the CORRELATED grounds."""
        predicted = ~np.isnan(self.predicted)
        for split, judged in self.splits():
            if split in CORRELATED:
                yield split, Variogram.of(self.errors, judged & predicted)

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
        for split, use in USES.items():
            yield split, self.known & (self.use == use)
        yield "all", self.known


def inner(values: NDArray[_Kind], margin: int = MARGIN) -> NDArray[_Kind]:
    """A shard without the margin about it."""
    return values[margin:-margin, margin:-margin]
