"""What an export is to hold: tiles, mosaics and pyramids, and what each piece is made from."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from aeheight.blending import Mosaic, mosaic_grid
from aeheight.catalogue import Origin
from aeheight.cube import Tree
from aeheight.embeddings import ATTRIBUTION
from aeheight.pyramid import Pyramid
from aeheight.receipts import versions
from aeheight.settings import ExportSettings, fingerprint
from aeheight.steps.pyramids import in_pyramids, pyramid_of, stages
from aeheight.steps.run import ASKED, Made, Run
from aeheight.steps.shown import Opening, Shown, reference_of
from aeheight.steps.tiles import LEDGER, ONCE
from aeheight.store import Store
from aeheight.template import Layer, Shard
from aeheight.windows import Region, tile

LATER = ("crs", "resolution", "pyramids", "area")
"""Settings of what can be added later, and leaves the zones' files as they are."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was ever asked for beside the zones' files: recorded, so that later exports keep it."""

    mosaics: Mapping[str, Mapping[str, Any]]
    """`crs` and `resolution` of each, by the name of its folder."""
    pyramids: bool

    @classmethod
    def before(cls, run: Run) -> "Asked":
        """As recorded beside the receipts; nothing, where all is made anew."""
        store = run.ledger(LEDGER).store
        if run.options.overwrite or not store.exists(ASKED):
            return cls({}, False)
        return cls(**store.read_json(ASKED))

    def record(self, store: Store) -> None:
        """Write it beside the receipts, where it is another than before."""
        found = asdict(self)
        if not store.exists(ASKED) or store.read_json(ASKED) != found:
            store.write(ASKED, json.dumps(found, indent=1, sort_keys=True).encode())


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be exported, and how."""

    tree: Tree
    cube: Tree | None
    """Holds the reference; None: none is shown."""
    settings: ExportSettings
    mosaics: tuple[Mosaic, ...]
    """All that were ever asked for; of one folder, the last."""
    made: Made
    below: Made | None
    """The cube's."""
    asked: Asked
    name: str
    """Of the region."""
    note: str | None
    """Likewise."""

    @classmethod
    def of(cls, run: Run) -> "Wanted":
        """Of a run, checked.

        Raises:
            InputError: the map or its reference is not whole, or the mosaic's CRS cannot be used.
        """
        return cls.with_map(run, run.whole_map(run.settings.export.map))

    @classmethod
    def with_map(cls, run: Run, tree: Tree) -> "Wanted":
        """Of a run and its map, whole or not; see `of`."""
        settings, asked = run.settings.export, Asked.before(run)
        cube = reference_of(run, settings, tree)
        found = {name: _mosaic(tree, **each) for name, each in asked.mosaics.items()}
        described = dict(asked.mosaics)
        if settings.crs:
            mosaic = _mosaic(tree, settings.crs, settings.resolution)
            found[mosaic.name] = mosaic
            described[mosaic.name] = {"crs": settings.crs, "resolution": settings.resolution}
        return cls(
            tree,
            cube,
            settings,
            tuple(found.values()),
            Made(tree.template, run.ledger(settings.map).done()),
            Made(cube.template, run.ledger("cube").done()) if cube else None,
            Asked(described, settings.pyramids or asked.pyramids),
            run.settings.name,
            run.settings.note,
        )

    @property
    def shown(self) -> Shown:
        """The layers, as they travel to workers."""
        return Shown(Opening.of(self.tree), Opening.of(self.cube) if self.cube else None)

    def begun_with(self) -> dict[str, Any]:
        """All that the zones' files depend on, and may not change."""
        aside = {*LATER} | ({"reference"} if self.settings.reference else set())
        settings = self.settings.model_dump(mode="json", exclude=aside)
        return {"export": settings, "map": self.tree.identity}

    def tiles(self) -> list[Shard]:
        """Every tile that may hold a height, of the zones and then of the mosaics."""
        mosaics = [shard for mosaic in self.mosaics for shard in self._of_mosaic(mosaic)]
        return [*self._of_zones(), *mosaics]

    def stages(self) -> list[list[Shard]]:
        """The squares of the pyramids, stage by stage; none where they are not wanted."""
        if not self.asked.pyramids:
            return []
        return stages(self.pyramid, self.ground.holds, self.inputs)

    def once(self, tiles: Iterable[Shard]) -> Shard:
        """What the export has once (pictures, model, collection), made from all of the tiles."""
        about = [asdict(self.origin()), self.note, self.asked.pyramids]
        found = [(shard.name, shard.inputs) for shard in tiles]
        return replace(ONCE, inputs=fingerprint([about, sorted(found)]))

    def layers(self, shard: Shard) -> int:
        """How many layers a tile or a square has at most."""
        if any(shard.group == mosaic.name for mosaic in self.mosaics):
            return len(self.shown.of_map())
        layers = self.shown.layers()
        if not in_pyramids(shard.group):
            return len(layers)
        return sum(layer.timed == (shard.year is not None) for layer in layers)

    @property
    def pyramid(self) -> Pyramid:
        """That of all zones, wanted or not."""
        return pyramid_of(self.shown, self.settings, self.origin())

    @property
    def ground(self) -> "Ground":
        """Where the map has shards."""
        return Ground(self.tree)

    def inputs(self, zone: str, year: int | None, region: Region) -> list[str]:
        """What a region of a zone is made from: the map in a year, and its reference."""
        mapped = [] if year is None else self.made.inputs(zone, {"height": year}, region)
        return mapped + (self.below.inputs(zone, {"height": None}, region) if self.below else [])

    def said(self, layers: Sequence[Layer]) -> str:
        """Fingerprint of what files and items say of layers, but for the versions that made them.

        A newer library alone makes no file anew.
        """
        origin = asdict(replace(self.origin(), software={}))
        return fingerprint([origin, [[each.bare(), dict(each.attributes)] for each in layers]])

    def _of_zones(self) -> Iterator[Shard]:
        ground, said = self.ground, self.said(self.shown.layers())
        for grid in self.tree.template.grids:
            for year in self.tree.template.years:
                for region in tile(grid.shape, self.settings.tile):
                    if ground.holds(grid.name, region):
                        inputs = [said, self.inputs(grid.name, year, region)]
                        yield Shard(grid.name, "height", year, region, fingerprint(inputs))

    def _of_mosaic(self, mosaic: Mosaic) -> Iterator[Shard]:
        ground, group = self.ground, mosaic.name
        described = [self.said(self.shown.of_map()), asdict(mosaic.grid), mosaic.reach]
        for year in self.tree.template.years:
            for region in tile(mosaic.grid.shape, self.settings.tile):
                parts = [(z.name, r) for z, r in mosaic.touched(region) if ground.holds(z.name, r)]
                inputs = [self.made.inputs(name, {"height": year}, r) for name, r in parts]
                if parts:
                    made_from = fingerprint([described, inputs])
                    yield Shard(group, "height", year, region, made_from)

    def origin(self) -> Origin:
        """What the catalogue says of all tiles."""
        about, corrected = self.tree.template.layer("height").attributes, ""
        if self.settings.map == "calibrated":
            corrected = ", corrected by reference heights"
        return Origin(
            self.name,
            str(about.get("surface", "unknown")),
            str(about.get("vertical_datum", "unknown")),
            str(about.get("checkpoint", "unknown")),
            f"Predicted by aeheight from AlphaEarth embeddings{corrected}. {ATTRIBUTION}",
            {name: versions()[name] for name in ("aeheight", "rasterio")},
        )


def _mosaic(tree: Tree, crs: str, resolution: float | None) -> Mosaic:
    grids, halo = tree.template.grids, tree.template.cut.halo
    grid = mosaic_grid(grids, crs, resolution)
    # Two pixels less than embeddings reach: interpolation needs a neighbour.
    return Mosaic(grid, grids, max(halo - 2, 1) * max(grids[0].pixel_metres()))


class Ground:
    """Where the shards of a map lie."""

    def __init__(self, tree: Tree) -> None:
        """List them once."""
        found: dict[str, list[tuple[int, int, int, int]]] = {}
        for shard in tree.template.shards("height"):
            r = shard.region
            found.setdefault(shard.group, []).append((r.row, r.col, r.bottom, r.right))
        self._places = {group: np.array(places).T for group, places in found.items()}

    def holds(self, group: str, region: Region) -> bool:
        """Whether a shard of the group shares a pixel with a region."""
        if group not in self._places:
            return False
        top, left, bottom, right = self._places[group]
        rows = (top < region.bottom) & (region.row < bottom)
        return bool((rows & (left < region.right) & (region.col < right)).any())
