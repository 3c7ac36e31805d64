"""Ingest: tiles and rasters to the cube, one shard a task."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight import embeddings
from aeheight.cluster import Outcome
from aeheight.cube import Layer, Shard, Template, Tree, create, open_tree
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.settings import HeightSettings, RegionSettings
from aeheight.sources import Sources, read_embeddings, read_heights, scan
from aeheight.steps.run import Plan, Run, carry_out, cube_settings, cube_shards
from aeheight.store import Store
from aeheight.windows import whole

_SOURCES = "sources.json"


def template(settings: RegionSettings, grid: Grid) -> Template:
    """The cube of a region, before its first pixel."""
    layers = [
        Layer(
            "embedding",
            "int8",
            embeddings.NODATA,
            timed=True,
            bands=embeddings.BAND_NAMES,
            attributes={
                "long_name": "AlphaEarth Foundations embedding, as its int8 code",
                "comment": "u = code / 127.5; value = u * |u|; -128 is nodata, in all bands",
                "units": "1",
                "attribution": embeddings.ATTRIBUTION,
                "embedding_version": embeddings.VERSION,
            },
        )
    ]
    for name, wanted in (("height", settings.height), ("prior", settings.prior)):
        if wanted:
            layers.append(Layer(name, "float32", np.nan, attributes=_about(name, wanted)))
    if settings.height:
        layers.append(
            Layer(
                "split",
                "uint8",
                0,
                attributes={
                    "long_name": "use of the ground",
                    "flag_values": [0, 1, 2, 3],
                    "flag_meanings": "unused train validation test",
                },
            )
        )
    return Template(
        (grid,),
        tuple(layers),
        settings.embeddings.years,
        settings.cube,
        f"aeheight cube of {settings.name}",
    )


def _about(name: str, wanted: HeightSettings) -> dict[str, Any]:
    kind = {"dsm": "surface", "dtm": "terrain"}[wanted.surface]
    return {
        "long_name": f"{'reference' if name == 'height' else 'prior'} height of the {kind}",
        "standard_name": "surface_altitude",
        "units": "m",
        "surface": wanted.surface,
        "vertical_datum": wanted.vertical_datum,
        "epoch": wanted.epoch or "unknown",
    }


def begun_with(settings: RegionSettings, grid: Grid) -> dict[str, Any]:
    """The settings that the cube's receipts hold on to."""
    return cube_settings(settings) | {
        "grid": {"crs": grid.crs, "resolution": grid.resolution, "bounds": list(grid.bounds)}
    }


def plan(run: Run) -> Plan:
    """What ingest would read and write, from headers alone.

    Raises:
        InputError: bad input; see `sources.scan`.
    """
    grid, sources = scan(run.settings)
    made = template(run.settings, grid)
    shards = cube_shards(made)
    edge = made.cut.shard
    if not run.options.overwrite:
        run.ledger("cube").check(begun_with(run.settings, grid), "ingest")
    written = sum(_shard_bytes(made, shard) for shard in shards)
    return Plan(
        "ingest",
        {
            "group": grid.name,
            "crs": grid.crs,
            "resolution": grid.resolution,
            "rows_x_columns": f"{grid.shape[0]} x {grid.shape[1]}",
            "bounds": grid.bounds,
            "years": list(made.years),
            "tiles": len(sources.tiles),
            "covered_by_tiles": f"{100 * _covered(sources, grid):.1f} % of the grid",
            "height_rasters": len(sources.height.rasters) if sources.height else 0,
            "prior_rasters": len(sources.prior.rasters) if sources.prior else 0,
            "shards": len(shards),
            "pending": run.left("cube", shards),
            "shard_px": edge,
            "raw_bytes": written,
            "peak_worker_bytes": 3 * embeddings.BANDS * edge**2 + 300_000_000,
        },
    )


def _covered(sources: Sources, grid: Grid) -> float:
    """Share of the grid that lies under some tile, to about a thousandth."""
    every = max(max(grid.shape) // 1000, 1)
    under = np.zeros([-(-size // every) for size in grid.shape], dtype=bool)
    for tile in sources.tiles:
        if shared := tile.placed(grid).intersect(whole(grid.shape)):
            rows, cols = shared.slices
            under[-(-rows.start // every) : -(-rows.stop // every),
                  -(-cols.start // every) : -(-cols.stop // every)] = True  # fmt: skip
    return float(under.mean())


def _shard_bytes(made: Template, shard: Shard) -> int:
    layer = made.layer(shard.layer)
    return shard.region.size * max(len(layer.bands), 1) * np.dtype(layer.dtype).itemsize


def execute(run: Run) -> Outcome:
    """Write every pending shard of the cube.

    Raises:
        InputError: bad input, changed settings, or a region without any valid pixel.
    """
    grid, sources = scan(run.settings)
    made = template(run.settings, grid)
    ledger = run.ledger("cube")
    if run.options.overwrite:
        run.discard(ledger.store, run.ledger("split").store, run.cube)
    tree = create(run.cube, made)
    ledger = ledger.begin(begun_with(run.settings, grid) | {"cube_identity": tree.identity})
    shards = cube_shards(made)
    if ledger.pending(shards):
        _hold_sources(ledger, sources)
    task = Ingest(run.cube.uri, tree.identity, ledger.store.uri, ledger.key)
    outcome = carry_out(run, "ingest", ledger, shards, task)
    if not outcome.failed:
        _refuse_empty(ledger, made)
    return outcome


def _hold_sources(ledger: Ledger, sources: Sources) -> None:
    """Record the files that the cube is made from: every shard of it from the same.

    Raises:
        InputError: shards were made from other files; names them.
    """
    if not ledger.done():
        ledger.store.write(_SOURCES, sources.to_bytes())
    elif (known := Sources.from_bytes(ledger.store.read(_SOURCES))) != sources:
        before, now = _files(known), _files(sources)
        changed = [f"no longer there: {href}" for href in sorted(before - now)]
        changed += [f"new: {href}" for href in sorted(now - before)]
        raise InputError(
            "the source files are not those that the cube was begun with:\n  "
            + "\n  ".join(changed[:10] or ["the header of a file changed"])
            + "\nput them back, or run with --overwrite to make the cube anew"
        )


def _files(sources: Sources) -> set[str]:
    models = [model for model in (sources.height, sources.prior) if model]
    rasters = {raster.href for model in models for raster in model.rasters}
    return rasters | {tile.href for tile in sources.tiles}


def _refuse_empty(ledger: Ledger, made: Template) -> None:
    for layer in ("embedding", "height"):
        if layer not in {known.name for known in made.layers}:
            continue
        if not any(ledger.receipt(shard.name).valid for shard in made.shards(layer)):
            raise InputError(
                f"no pixel of the region has {'an' if layer == 'embedding' else 'a'} {layer}: the "
                f"files touch {list(made.grids[0].bounds)} but hold only nodata there; move the "
                "grid or choose other files, then run with --overwrite"
            )


@dataclass(frozen=True, slots=True)
class Ingest:
    """Makes one shard of the cube; travels to workers as these few words."""

    cube: str
    identity: str
    ledger: str
    key: str

    def __call__(self, shard: Shard) -> Receipt:
        """Read, write, leave the receipt."""
        started = time.monotonic()
        ledger = Ledger(Store(self.ledger))
        tree, sources = _opened(self.cube, self.identity, self.ledger, self.key)
        values = self._read(sources, tree.template.grid(shard.group), shard)
        valid = embeddings.valid(values) if shard.layer == "embedding" else ~np.isnan(values)
        receipt = receipt_for(shard, values, tree.write(shard, values), valid, self.key, started)
        ledger.leave(receipt)
        return receipt

    def _read(self, sources: Sources, grid: Grid, shard: Shard) -> NDArray[Any]:
        if shard.layer == "embedding":
            assert shard.year is not None
            return read_embeddings(sources.tiles, grid, shard.region, shard.year)
        source = {"height": sources.height, "prior": sources.prior}[shard.layer]
        assert source is not None
        return read_heights(source, grid, shard.region)


@lru_cache(maxsize=4)
def _opened(cube: str, _identity: str, ledger: str, _key: str) -> tuple[Tree, Sources]:
    """Once a worker, cube and settings."""
    return open_tree(Store(cube)), Sources.from_bytes(Store(ledger).read(_SOURCES))
