"""What a tree of arrays promises before its first pixel: layers, grids, years, and its shards.

A `Shard` is the name of one piece of work: the task, the log line, the receipt. Nothing here opens
a store.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from aeheight.grid import Grid
from aeheight.settings import CubeSettings
from aeheight.windows import Region, Runs, tile

_NO_YEAR = "static"


@dataclass(frozen=True, slots=True)
class Layer:
    """One array of every group."""

    name: str
    dtype: str
    """A numpy type, such as `int8`."""
    nodata: float
    """What a missing pixel holds: Zarr's fill value, and the declared attribute."""
    timed: bool = False
    """Whether there is one plane a year."""
    bands: tuple[str, ...] = ()
    """Names along the band axis; empty: there is none."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """CF attributes (`units`, `long_name`, ...)."""

    def bare(self) -> tuple[object, ...]:
        """All but its attributes, for comparison."""
        return self.name, self.dtype, plain_nodata(self.nodata), self.timed, self.bands

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes."""
        return (*(["time"] if self.timed else []), *(["band"] if self.bands else []), "y", "x")


@dataclass(frozen=True, slots=True)
class Shard:
    """The name of one piece of work: one stored object of one layer."""

    group: str
    layer: str
    year: int | None
    """None for a layer without a time axis."""
    region: Region
    """The shard's pixels, clipped to the grid."""
    inputs: str = field(default="", compare=False)
    """Fingerprint of what it is made from, no part of its name; empty: not said."""

    @property
    def name(self) -> str:
        """`utm10n/embedding/2021/r0000256-c0000000-256x256`."""
        return f"{self.group}/{self.layer}/{self.year or _NO_YEAR}/{self.region.name}"

    @classmethod
    def parse(cls, name: str) -> "Shard":
        """The shard of a `name`."""
        group, layer, year, region = name.split("/")
        return cls(group, layer, None if year == _NO_YEAR else int(year), Region.parse(region))


def plain_nodata(nodata: float) -> float | int | str:
    """A nodata value as JSON can hold it."""
    if np.isnan(nodata):
        return "NaN"
    return int(nodata) if nodata == int(nodata) else nodata


@dataclass(frozen=True, slots=True)
class Template:
    """All that is fixed before the first pixel is written."""

    grids: tuple[Grid, ...]
    """One a group."""
    layers: tuple[Layer, ...]
    years: tuple[int, ...]
    cut: CubeSettings
    title: str
    ground: tuple[Runs | None, ...] = ()
    """The shards that are made, one entry a grid; None, or nothing at all: every shard."""

    def layer(self, name: str) -> Layer:
        """The layer of a name."""
        return next(layer for layer in self.layers if layer.name == name)

    def grid(self, group: str) -> Grid:
        """The grid of a group."""
        return next(grid for grid in self.grids if grid.name == group)

    def shards(self, layer: str) -> list[Shard]:
        """Every shard of a layer, in order."""
        years: Sequence[int | None] = self.years if self.layer(layer).timed else [None]
        ground = self.ground or (None,) * len(self.grids)
        return [
            Shard(grid.name, layer, year, region)
            for grid, runs in zip(self.grids, ground, strict=True)
            for year in years
            for region in tile(grid.shape, self.cut.shard, runs)
        ]

    def extends(self, old: "Template") -> bool:
        """Whether it only has more years, ground or layers than another (or other attributes)."""
        same = replace(old, years=self.years, ground=self.ground, title=self.title, layers=())
        bare = [layer.bare() for layer in self.layers]
        return (
            same.describe() == replace(self, layers=()).describe()
            and all(layer.bare() in bare for layer in old.layers)
            and set(old.years) <= set(self.years)
            and old._squares() <= self._squares()
        )

    def _squares(self) -> set[tuple[str, Region]]:
        """Group and region of every shard, whatever the layer and year."""
        ground = self.ground or (None,) * len(self.grids)
        return {
            (grid.name, region)
            for grid, runs in zip(self.grids, ground, strict=True)
            for region in tile(grid.shape, self.cut.shard, runs)
        }

    def describe(self) -> dict[str, Any]:
        """The template as JSON holds it."""
        plain = asdict(self) | {"cut": self.cut.model_dump()}
        described: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        described["grids"] = {
            grid.name: entry for grid, entry in zip(self.grids, described["grids"], strict=True)
        }
        described["layers"] = {entry.pop("name"): entry for entry in described["layers"]}
        for layer in self.layers:
            described["layers"][layer.name]["nodata"] = plain_nodata(layer.nodata)
        return described

    @classmethod
    def described(cls, found: Mapping[str, Any]) -> "Template":
        """The template of `describe`."""
        grids = tuple(
            Grid(**(entry | {"shape": tuple(entry["shape"])})) for entry in found["grids"].values()
        )
        layers = tuple(
            Layer(
                name=name,
                **(entry | {"bands": tuple(entry["bands"]), "nodata": float(entry["nodata"])}),
            )
            for name, entry in found["layers"].items()
        )
        ground = tuple(
            None if runs is None else tuple(tuple(run) for run in runs) for runs in found["ground"]
        )
        cut = CubeSettings(**found["cut"])
        return cls(grids, layers, tuple(found["years"]), cut, found["title"], ground)
