"""Export: a finished map to files that every GIS opens, one tile a task.

A task writes a COG for each layer of its tile and the STAC item that describes them. What is made
once for all tiles (pictures, the collection) is `publish`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from aeheight.blending import Mosaic, mosaic_grid
from aeheight.catalogue import COLLECTION, Origin
from aeheight.cluster import Outcome
from aeheight.cube import Tree, find, open_tree
from aeheight.embeddings import ATTRIBUTION
from aeheight.errors import InputError
from aeheight.pyramid import Pyramid, found_version
from aeheight.receipts import Ledger, versions
from aeheight.settings import ExportSettings, fingerprint
from aeheight.steps import area
from aeheight.steps.pyramids import (
    PYRAMIDS,
    Halve,
    in_pyramids,
    pyramid_of,
    stages,
    task_bytes,
)
from aeheight.steps.run import Made, Plan, Run, carry_out
from aeheight.steps.shown import Opening, Shown, reference_of
from aeheight.steps.tiles import Check, Export, files_of
from aeheight.template import Shard
from aeheight.windows import Region, tile

LEDGER, FOLDER = "export", "export"
"""Receipts and files, under the run's store."""
_FOLDERS = {LEDGER: FOLDER, area.LEDGER: area.FOLDER}
_LATER = ("crs", "resolution", "pyramids", "area")
"""Settings of what can be added later, and leaves the zones' files as they are."""
_PROCESS_BYTES = 500_000_000
"""Upper bound for two tasks at hand; measured with one: 175 MB, of a mosaic 360 MB."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be exported, and how."""

    tree: Tree
    cube: Tree | None
    """Holds the reference; None: none is shown."""
    settings: ExportSettings
    mosaic: Mosaic | None
    made: Made
    below: Made | None
    """The cube's."""
    pyramids: bool
    """Whether they are wanted: asked for, or there."""
    name: str
    """Of the region."""

    @classmethod
    def of(cls, run: Run) -> "_Work":
        """Of a run, checked.

        Raises:
            InputError: the map or its reference is not whole, or the mosaic's CRS cannot be used.
        """
        return cls.with_map(run, run.whole_map(run.settings.export.map))

    @classmethod
    def with_map(cls, run: Run, tree: Tree) -> "_Work":
        """Of a run and its map, whole or not; see `of`."""
        settings = run.settings.export
        cube = reference_of(run, settings, tree)
        return cls(
            tree,
            cube,
            settings,
            _mosaic(tree, settings) if settings.crs else None,
            Made(tree.template, run.ledger(settings.map).done()),
            Made(cube.template, run.ledger("cube").done()) if cube else None,
            settings.pyramids or _has_pyramids(run),
            run.settings.name,
        )

    @property
    def shown(self) -> Shown:
        """The layers, as they travel to workers."""
        return Shown(Opening.of(self.tree), Opening.of(self.cube) if self.cube else None)

    def begun_with(self) -> dict[str, Any]:
        """All that the zones' files depend on; the mosaic's CRS is in the names of its own."""
        aside = {*_LATER} | ({"reference"} if self.settings.reference else set())
        settings = self.settings.model_dump(mode="json", exclude=aside)
        return {"export": settings, "map": self.tree.identity}

    def tiles(self) -> list[Shard]:
        """Every tile that may hold a height, of the zones and then of the mosaic."""
        return [*self._of_zones(), *(self._of_mosaic(self.mosaic) if self.mosaic else ())]

    def stages(self) -> list[list[Shard]]:
        """The squares of the pyramids, stage by stage; none where they are not wanted."""
        if not self.pyramids:
            return []
        return stages(self.pyramid, _Ground(self.tree).holds, self.inputs)

    def shards(self) -> list[Shard]:
        """All pieces of work."""
        return [*self.tiles(), *chain.from_iterable(self.stages())]

    def layers(self, shard: Shard) -> int:
        """How many layers a tile or a square has at most."""
        shown = self.shown
        if self.mosaic and shard.group == self.mosaic.name:
            return len(shown.of_map())
        if not in_pyramids(shard.group):
            return len(shown.layers())
        return sum(layer.timed == (shard.year is not None) for layer in shown.layers())

    @property
    def pyramid(self) -> Pyramid:
        """That of all zones, wanted or not."""
        return pyramid_of(self.shown, self.settings, self.origin())

    def inputs(self, zone: str, year: int | None, region: Region) -> list[str]:
        """What a region of a zone is made from: the map in a year, and its reference."""
        mapped = [] if year is None else self.made.inputs(zone, {"height": year}, region)
        return mapped + (self.below.inputs(zone, {"height": None}, region) if self.below else [])

    def _of_zones(self) -> Iterator[Shard]:
        ground = _Ground(self.tree)
        for grid in self.tree.template.grids:
            for year in self.tree.template.years:
                for region in tile(grid.shape, self.settings.tile):
                    if ground.holds(grid.name, region):
                        inputs = self.inputs(grid.name, year, region)
                        yield Shard(grid.name, "height", year, region, fingerprint(inputs))

    def _of_mosaic(self, mosaic: Mosaic) -> Iterator[Shard]:
        ground, group = _Ground(self.tree), mosaic.name
        described = [asdict(mosaic.grid), mosaic.reach]
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


def _has_pyramids(run: Run) -> bool:
    place = run.store.child(FOLDER).child(PYRAMIDS)
    return not run.options.overwrite and found_version(place) is not None


def _mosaic(tree: Tree, settings: ExportSettings) -> Mosaic:
    grids, halo = tree.template.grids, tree.template.cut.halo
    assert settings.crs is not None
    grid = mosaic_grid(grids, settings.crs, settings.resolution)
    # Two pixels less than embeddings reach: interpolation needs a neighbour.
    return Mosaic(grid, grids, max(halo - 2, 1) * max(grids[0].pixel_metres()))


class _Ground:
    """Where the shards of a map lie."""

    def __init__(self, tree: Tree) -> None:
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


def plan(run: Run) -> Plan:
    """What export would write, from metadata alone; the files are smaller than its raw bytes.

    Raises:
        InputError: the map is not whole, or was exported with other settings.
    """
    work, ledger = _Work.of(run), run.ledger(LEDGER)
    if work.settings.area is not None:
        return _plan_area(run, work)
    if not run.options.overwrite:
        ledger.check(work.begun_with(), "export")
    tiles, later = work.tiles(), work.stages()
    shards = [*tiles, *chain.from_iterable(later)]
    layers = {tile: work.layers(tile) for tile in tiles}
    squares = {square: work.layers(square) for square in (later[0] if later else [])}
    facts: dict[str, Any] = {
        "map": work.settings.map,
        "files": sum(layers.values()),
        "layers": [layer.name for layer in work.shown.layers()],
        "shards": len(shards),
        "pending": run.left(LEDGER, shards),
        "tile_px": work.settings.tile,
    }
    if later:
        facts["pyramids"] = f"{PYRAMIDS}, from squares of {work.pyramid.tile} px"
    if work.mosaic:
        grid = work.mosaic.grid
        facts["mosaic"] = f"{grid.crs}, {grid.shape[0]} x {grid.shape[1]} px of {grid.resolution:g}"
    pixels = sum(shard.region.size * count for shard, count in (layers | squares).items())
    return Plan(
        "export",
        facts
        | {
            "bytes_to_write": 4 * pixels * 4 // 3,
            "temporary_bytes_per_task": 4 * 3 * max((t.region.size for t in tiles), default=0),
            "peak_worker_bytes": _PROCESS_BYTES + 2 * task_bytes(work.pyramid) * work.pyramids,
        },
    )


def execute(run: Run) -> Outcome:
    """Export every pending tile, then the pictures and the collection.

    Raises:
        InputError: the map is not whole, or was exported with other settings.
    """
    work, ledger, place = _Work.of(run), run.ledger(LEDGER), run.store.child(FOLDER)
    if work.settings.area is not None:
        return _clip(run, work)
    tiles, later = work.tiles(), work.stages()
    shards = [*tiles, *chain.from_iterable(later)]
    if run.options.overwrite:
        run.discard(ledger.store, place, run.ledger(area.LEDGER).store)
    ledger = ledger.begin(work.begun_with())
    gone = _outgrown(work, ledger, shards)
    forget(run, gone)
    if gone or ledger.pending(shards):
        place.remove_many([COLLECTION])  # written last: where it lies, the export is whole
    task = Export(
        work.shown,
        place.uri,
        ledger.store.uri,
        ledger.key,
        work.settings,
        work.origin(),
        work.mosaic,
    )
    outcome = carry_out(run, "export", ledger, tiles, task)
    if later and not outcome.failed:
        outcome = _halve(run, work, ledger, later, outcome)
    if not outcome.failed and not place.exists(COLLECTION):
        # Only this needs PyTorch, for what the checkpoint says of itself.
        from aeheight.steps.publish import publish  # noqa: PLC0415

        publish(run, task, work.tree, ledger)
    return outcome


def _area(run: Run, work: _Work) -> tuple[Ledger, area.Clip, list[Shard]]:
    """Receipts, task and shards of an area; what they are made from is all in their inputs."""
    ledger, place = run.ledger(area.LEDGER), run.store.child(area.FOLDER)
    ledger = replace(ledger, key=fingerprint({}))
    wanted = area.Area.of(run.settings)
    task = area.Clip(
        work.shown, wanted, place.uri, ledger.store.uri, ledger.key, work.settings, work.origin()
    )
    found = wanted.regions(work.tree.template.grids, _Ground(work.tree).holds)
    return (
        ledger,
        task,
        [
            task.shard(zone, year, region, work.inputs(zone, year, region))
            for zone, region in found
            for year in work.tree.template.years
        ],
    )


def _plan_area(run: Run, work: _Work) -> Plan:
    ledger, task, shards = _area(run, work)
    layers, largest = task.shown.layers(), max(shard.region.size for shard in shards)
    sizes = {s.group: f"{s.region.height} x {s.region.width} px" for s in shards}
    return Plan(
        "export",
        {
            "map": work.settings.map,
            "area": [f"{zone} {size}" for zone, size in sizes.items()],
            "files": len(shards) * len(layers),
            "layers": [layer.name for layer in layers],
            "shards": len(shards),
            "pending": len(shards if run.options.overwrite else ledger.pending(shards)),
            "bytes_to_write": 4 * len(layers) * sum(shard.region.size for shard in shards),
            "temporary_bytes_per_task": 4 * largest,
            "peak_worker_bytes": _PROCESS_BYTES,
        },
    )


def _clip(run: Run, work: _Work) -> Outcome:
    ledger, task, shards = _area(run, work)
    if run.options.overwrite:
        run.discard(ledger.store, run.store.child(area.FOLDER))
    return carry_out(run, "area", ledger.begin({}), shards, task)


def _halve(
    run: Run, work: _Work, ledger: Ledger, stages: Sequence[list[Shard]], before: Outcome
) -> Outcome:
    """Make the pyramids; the outcome of this and of what was done before."""
    place, pyramid = run.store.child(FOLDER), work.pyramid
    pyramid.create(place.child(PYRAMIDS))
    task, sums = Halve(work.shown, pyramid, place.uri, ledger.store.uri, ledger.key), before
    for stage in stages:
        found = carry_out(run, "pyramids", ledger, stage, task)
        sums = Outcome(
            sums.done + found.done,
            sums.skipped + found.skipped,
            found.failed,
            sums.seconds + found.seconds,
            sums.pixels + found.pixels,
        )
        if found.failed:  # what is above would be made from holes
            break
    return sums


def _outgrown(work: _Work, ledger: Ledger, shards: Sequence[Shard]) -> list[str]:
    """What an earlier mosaic in the same CRS, or earlier pyramids, would leave beside the new."""
    wanted = {shard.name for shard in shards}
    return [
        name
        for name in ledger.done()
        if name not in wanted
        and (
            (work.mosaic is not None and name.startswith(f"{work.mosaic.name}/"))
            or (work.pyramids and in_pyramids(name))
        )
    ]


def forget(run: Run, names: Sequence[str], label: str = LEDGER) -> None:
    """Remove the files and receipts of some tiles, or of areas."""
    ledger, place = run.ledger(label).current(), run.store.child(_FOLDERS[label])
    found = [key for receipt in ledger.receipts(names) for key in files_of(receipt)]
    place.remove_many(found)
    ledger.forget(names)


def as_made(run: Run) -> Run:
    """The run with the settings that its files were made with, for repair."""
    made = (run.ledger(LEDGER).settings() or {})["export"]
    settings = ExportSettings(**made).model_dump(exclude={*_LATER})
    export = run.settings.export.model_copy(update=settings | {"area": None})
    return replace(run, settings=run.settings.model_copy(update={"export": export}))


def progress(run: Run) -> tuple[int, int] | None:
    """Tiles that are done, and all of them; None before the first, or where the map is gone."""
    ledger = run.ledger(LEDGER)
    begun = ledger.settings()
    if begun is None or find(run.store.child(f"{begun['export']['map']}.zarr")) is None:
        return None
    tree = open_tree(run.store.child(f"{begun['export']['map']}.zarr"))
    try:
        shards = _Work.with_map(as_made(run), tree).shards()
    except InputError:  # its reference is no longer whole, or of an older map
        return 0, len(ledger.finished()) or 1
    left = len(shards) if begun["map"] != tree.identity else len(ledger.pending(shards))
    return len(shards) - left, len(shards)


def checks(run: Run) -> Iterator[tuple[str, Ledger, Check]]:
    """Label and receipts of what was exported, and the task that compares its files with them."""
    for label, folder in _FOLDERS.items():
        ledger = run.ledger(label)
        if ledger.settings() is not None:
            ledger = ledger.current()
            yield label, ledger, Check(run.store.child(folder).uri, ledger.store.uri, ledger.key)
