"""Export: a finished map to files that every GIS opens, one tile a task.

A task writes a COG for each layer of its tile and the STAC item that describes them. What is made
once for all tiles (pictures, the collection) is `publish`'s.
"""

import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from aeheight import __version__
from aeheight.blending import Mosaic, mosaic_grid
from aeheight.catalogue import COLLECTION, File, Origin, tile_item
from aeheight.cluster import Outcome
from aeheight.cube import Tree, find, open_tree
from aeheight.embeddings import ATTRIBUTION
from aeheight.export import About, Moments, file_pieces, overview, sha256, write_cog
from aeheight.grid import Grid
from aeheight.receipts import Ledger, Receipt, versions
from aeheight.settings import ExportSettings, fingerprint
from aeheight.sources.datum import compound
from aeheight.steps.run import Made, Plan, Run, carry_out
from aeheight.store import Store
from aeheight.template import Layer, Shard
from aeheight.windows import Region, tile

LEDGER, FOLDER = "export", "export"
"""Receipts and files, under the run's store."""
PICTURE = 1600
"""Longest edge of a picture, pixels."""
_ITEM = "item"
"""What a receipt calls the STAC item among its files."""
_PROCESS_BYTES = 500_000_000
"""Upper bound for two tasks at hand; measured with one: 175 MB, of a mosaic 360 MB."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be exported, and how."""

    tree: Tree
    settings: ExportSettings
    mosaic: Mosaic | None
    made: Made
    name: str
    """Of the region."""

    @classmethod
    def of(cls, run: Run) -> "_Work":
        """Of a run, checked.

        Raises:
            InputError: the map is not whole, or the mosaic's CRS cannot be used.
        """
        settings = run.settings.export
        tree = run.whole_map(settings.map)
        mosaic = _mosaic(tree, settings) if settings.crs else None
        made = Made(tree.template, run.ledger(settings.map).done())
        return cls(tree, settings, mosaic, made, run.settings.name)

    def begun_with(self) -> dict[str, Any]:
        """All that the zones' files depend on; the mosaic's CRS is in the names of its own."""
        settings = self.settings.model_dump(mode="json", exclude={"crs", "resolution"})
        return {"export": settings, "map": self.tree.identity}

    def shards(self) -> list[Shard]:
        """Every tile that may hold a height, of the zones and then of the mosaic."""
        return [*self._of_zones(), *(self._of_mosaic(self.mosaic) if self.mosaic else ())]

    def _of_zones(self) -> Iterator[Shard]:
        ground = _Ground(self.tree)
        for grid in self.tree.template.grids:
            for year in self.tree.template.years:
                for region in tile(grid.shape, self.settings.tile):
                    if ground.holds(grid.name, region):
                        inputs = self.made.inputs(grid.name, {"height": year}, region)
                        yield Shard(grid.name, "height", year, region, fingerprint(inputs))

    def _of_mosaic(self, mosaic: Mosaic) -> Iterator[Shard]:
        ground, group = _Ground(self.tree), mosaic_name(mosaic)
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


def mosaic_name(mosaic: Mosaic) -> str:
    """The mosaic's folder, such as `mosaic-epsg3035`."""
    return f"mosaic-{mosaic.grid.name}"


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
    if not run.options.overwrite:
        ledger.check(work.begun_with(), "export")
    shards, layers = work.shards(), _layers(work.tree)
    pixels = sum(shard.region.size for shard in shards)
    largest = max((shard.region.size for shard in shards), default=0)
    facts: dict[str, Any] = {
        "map": work.settings.map,
        "files": len(shards) * len(layers),
        "layers": [layer.name for layer in layers],
        "shards": len(shards),
        "pending": run.left(LEDGER, shards),
        "tile_px": work.settings.tile,
    }
    if work.mosaic:
        grid = work.mosaic.grid
        facts["mosaic"] = f"{grid.crs}, {grid.shape[0]} x {grid.shape[1]} px of {grid.resolution:g}"
    return Plan(
        "export",
        facts
        | {
            "bytes_to_write": 4 * pixels * len(layers) * 4 // 3,
            "temporary_bytes_per_task": 4 * largest * 3,
            "peak_worker_bytes": _PROCESS_BYTES,
        },
    )


def execute(run: Run) -> Outcome:
    """Export every pending tile, then the pictures and the collection.

    Raises:
        InputError: the map is not whole, or was exported with other settings.
    """
    work, ledger, place = _Work.of(run), run.ledger(LEDGER), run.store.child(FOLDER)
    shards = work.shards()
    if run.options.overwrite:
        run.discard(ledger.store, place)
    ledger = ledger.begin(work.begun_with())
    gone = _outgrown(work, ledger, shards)
    forget(run, gone)
    if gone or ledger.pending(shards):
        place.remove_many([COLLECTION])  # written last: where it lies, the export is whole
    tree = work.tree
    task = Export(
        tree.store.uri,
        f"{tree.identity} {tree.version}",
        place.uri,
        ledger.store.uri,
        ledger.key,
        work.settings,
        work.origin(),
        work.mosaic,
    )
    outcome = carry_out(run, "export", ledger, shards, task)
    if not outcome.failed and not place.exists(COLLECTION):
        # Only this needs PyTorch, for what the checkpoint says of itself.
        from aeheight.steps.publish import publish  # noqa: PLC0415

        publish(run, task, tree, ledger)
    return outcome


def _outgrown(work: _Work, ledger: Ledger, shards: Sequence[Shard]) -> list[str]:
    """Tiles of an earlier mosaic in the same CRS, of which the files would stay beside the new."""
    if work.mosaic is None:
        return []
    wanted, group = {shard.name for shard in shards}, mosaic_name(work.mosaic)
    return [n for n in ledger.done() if n not in wanted and n.startswith(f"{group}/")]


def forget(run: Run, names: Sequence[str]) -> None:
    """Remove the files and receipts of some tiles."""
    ledger, place = run.ledger(LEDGER).current(), run.store.child(FOLDER)
    found = [key for receipt in ledger.receipts(names) for key in files_of(receipt)]
    place.remove_many(found)
    ledger.forget(names)


def as_made(run: Run) -> Run:
    """The run with the settings that its files were made with, for repair."""
    made = (run.ledger(LEDGER).settings() or {})["export"]
    export = run.settings.export.model_copy(update=ExportSettings(**made).model_dump(
        exclude={"crs", "resolution"}))  # fmt: skip
    return replace(run, settings=run.settings.model_copy(update={"export": export}))


def progress(run: Run) -> tuple[int, int] | None:
    """Tiles that are done, and all of them; None before the first, or where the map is gone."""
    ledger = run.ledger(LEDGER)
    begun = ledger.settings()
    if begun is None or find(run.store.child(f"{begun['export']['map']}.zarr")) is None:
        return None
    tree = open_tree(run.store.child(f"{begun['export']['map']}.zarr"))
    settings = as_made(run).settings.export
    mosaic = _mosaic(tree, settings) if settings.crs else None
    made = Made(tree.template, run.ledger(settings.map).done())
    shards = _Work(tree, settings, mosaic, made, run.settings.name).shards()
    left = len(shards) if begun["map"] != tree.identity else len(ledger.pending(shards))
    return len(shards) - left, len(shards)


def _layers(tree: Tree) -> list[Layer]:
    return [layer for layer in tree.template.layers if layer.timed and not layer.bands]


def key_of(shard: Shard, layer: str) -> str:
    """Where a file of a tile lies under the export; `item` is its STAC item."""
    folder, region = f"{shard.group}/{shard.year}", shard.region.name
    return f"{folder}/{region}.json" if layer == _ITEM else f"{folder}/{layer}-{region}.tif"


def files_of(receipt: Receipt) -> dict[str, str]:
    """Every file of a tile under the export, with its SHA-256; none where it is all nodata."""
    if not receipt.valid:
        return {}
    shard = Shard.parse(receipt.shard)
    found = {shard.layer: receipt.checksum, **receipt.further}
    return {key_of(shard, layer): digest for layer, digest in found.items()}


def picture_key(key: str, shard: Shard) -> str:
    """Where a tile's part of the picture lies, beside its receipt."""
    return f"{key}/{shard.name}.npy"


def picture_cut(shape: tuple[int, int], region: Region) -> Region:
    """A region of a grid of this shape, in pixels of its picture."""
    every = max(ceil(max(shape) / PICTURE), 1)
    row, col, bottom, right = (
        round(edge / every) for edge in (region.row, region.col, region.bottom, region.right)
    )
    return Region(row, col, max(bottom - row, 1), max(right - col, 1))


@dataclass(frozen=True, slots=True)
class Export:
    """Makes the files of one tile; travels to workers as these few words."""

    tree: str
    version: str
    """Identity and template of the map."""
    place: str
    """Where the files go."""
    ledger: str
    key: str
    settings: ExportSettings
    origin: Origin
    mosaic: Mosaic | None

    def __call__(self, shard: Shard) -> Receipt:
        """Read, write whole files, leave the receipt."""
        started = time.monotonic()
        tree, grid = _opened(self.tree, self.version), self.grid(shard.group)
        files: dict[str, File] = {}
        further: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="aeheight-") as folder:
            first, *others = _layers(tree)
            moments = self._put(tree, shard, first, Path(folder), files)
            if moments.valid:
                for layer in others:
                    self._put(tree, shard, layer, Path(folder), files)
                further = {name: file.sha256 for name, file in files.items() if name != first.name}
                further[_ITEM] = self._describe(shard, grid.part(shard.region), files)
            else:  # there may be files of an earlier map
                names = [layer.name for layer in others] + [_ITEM]
                Store(self.place).remove_many([key_of(shard, name) for name in names])
        low, high, mean = moments.bounds if moments.valid else (None, None, None)
        receipt = Receipt(
            shard=shard.name,
            checksum=files[first.name].sha256 if moments.valid else sha256(iter(())),
            pixels=moments.pixels,
            valid=moments.valid,
            minimum=low,
            maximum=high,
            mean=mean,
            settings=self.key,
            seconds=round(time.monotonic() - started, 3),
            inputs=shard.inputs,
            further=further,
        )
        Ledger(Store(self.ledger)).leave(receipt)
        return receipt

    def grid(self, group: str) -> Grid:
        """Of a zone, or of the mosaic."""
        if self.mosaic and group == mosaic_name(self.mosaic):
            return self.mosaic.grid
        return _opened(self.tree, self.version).template.grid(group)

    def _put(
        self, tree: Tree, shard: Shard, layer: Layer, folder: Path, files: dict[str, File]
    ) -> Moments:
        """Make a layer's COG here, and put it into the store in one piece."""
        grid, path = self.grid(shard.group), folder / f"{layer.name}.tif"
        read = partial(self._read, tree, shard, layer.name)
        about = self._about(shard, layer, grid)
        moments = write_cog(path, grid.part(shard.region), read, about, self.settings)
        key, place = key_of(shard, layer.name), Store(self.place)
        if not moments.valid:
            place.remove_many([key])
            return moments
        digest, size = sha256(file_pieces(path)), path.stat().st_size
        place.write(key, path)
        name = Path(key).name
        files[layer.name] = File(
            name, about.description, about.unit, size, digest, moments.statistics
        )
        if layer.name == shard.layer:
            self._keep_picture(shard, path, grid)
        path.unlink()
        return moments

    def _read(self, tree: Tree, shard: Shard, layer: str, window: Region) -> NDArray[np.float32]:
        """Pixels of a window of the tile."""
        row, col = shard.region.row + window.row, shard.region.col + window.col
        region = Region(row, col, *window.shape)
        if self.mosaic is None or shard.group != mosaic_name(self.mosaic):
            values: NDArray[np.float32] = tree.read(shard.group, layer, shard.year, region)
            return values
        return self.mosaic.read(
            region, lambda zone, part: tree.read(zone.name, layer, shard.year, part)
        )

    def _about(self, shard: Shard, layer: Layer, grid: Grid) -> About:
        told, origin = layer.attributes, self.origin
        description = str(told.get("long_name", layer.name))
        is_height = layer.name == "height"
        whole = compound(grid.crs, origin.vertical_datum) if is_height else None
        tags = {
            "TIFFTAG_SOFTWARE": f"aeheight {__version__}",
            "TIFFTAG_IMAGEDESCRIPTION": f"{description}, {origin.collection}, {shard.year}",
            "TIFFTAG_COPYRIGHT": ATTRIBUTION,
            "LAYER": layer.name,
            "YEAR": str(shard.year),
            "CHECKPOINT": origin.checkpoint,
            **({"SURFACE": origin.surface} if is_height else {}),
            **({"VERTICAL_DATUM": origin.vertical_datum} if is_height else {}),
            **({"CALIBRATION": str(told["calibration"])} if "calibration" in told else {}),
        }
        unit = {"m": "metre", "1": ""}.get(str(told.get("units", "1")), "")
        return About(description, unit, whole or CRS.from_user_input(grid.crs), tags)

    def _keep_picture(self, shard: Shard, path: Path, grid: Grid) -> None:
        """A small picture of the tile, from the COG's overviews."""
        data = io.BytesIO()
        np.save(data, overview(path, picture_cut(grid.shape, shard.region).shape))
        Store(self.ledger).write(picture_key(self.key, shard), data.getvalue())

    def _describe(self, shard: Shard, grid: Grid, files: Mapping[str, File]) -> str:
        """Write the STAC item; its SHA-256."""
        assert shard.year is not None
        name = f"{self.origin.collection}-{shard.group}-{shard.year}-{shard.region.name}"
        item = tile_item(name, grid, shard.year, files, self.origin, "../..")
        Store(self.place).write(key_of(shard, _ITEM), item)
        return sha256(iter((item,)))


@lru_cache(maxsize=2)
def _opened(tree: str, _version: str) -> Tree:
    return open_tree(Store(tree))


@dataclass(frozen=True, slots=True)
class Check:
    """Compares the files of one tile with its receipt; travels to workers as these few words."""

    place: str
    ledger: str
    key: str

    def __call__(self, shard: Shard) -> Receipt:
        """Read them again.

        Raises:
            OSError: one is missing, cannot be read, or has other bytes.
        """
        place, receipt = Store(self.place), Ledger(Store(self.ledger), self.key).receipt(shard.name)
        for key, expected in files_of(receipt).items():
            try:
                found = sha256(place.pieces(key))
            except FileNotFoundError as error:
                raise OSError(f"{key} is missing") from error
            if found != expected:
                raise OSError(f"{key}: SHA-256 {found}, not {expected}")
        return receipt


def check(run: Run) -> Check:
    """The task that compares the tiles of a run with their receipts."""
    ledger = run.ledger(LEDGER).current()
    return Check(run.store.child(FOLDER).uri, ledger.store.uri, ledger.key)
