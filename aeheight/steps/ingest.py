"""Ingest: tiles and rasters to the cube, one shard a task."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight import embeddings
from aeheight.cluster import Outcome
from aeheight.cube import (
    Tree,
    check_growth,
    create,
    digest,
    find,
    finish_growing,
    open_tree,
    remove_tree,
)
from aeheight.errors import InputError
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.settings import HeightSettings, RegionSettings, fingerprint
from aeheight.sources import Reader, Sources, scan
from aeheight.steps.run import (
    ASKED,
    Plan,
    Run,
    carry_out,
    cube_settings,
    cube_shards,
    height_settings,
    refuse_other_meaning,
    sources_asked,
)
from aeheight.steps.stored import TITLE
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template
from aeheight.windows import Region, whole
from aeheight.windows import tile as squares

SOURCES = "sources.json"
"""Every file of the cube with what its header says, beside the cube's receipts."""


def template(settings: RegionSettings, sources: Sources) -> Template:
    """The cube of a region, before its first pixel."""
    layers = [_embedding(settings)]
    for name, wanted in (("height", settings.height), ("prior", settings.prior)):
        if wanted:
            layers.append(Layer(name, "float32", np.nan, attributes=_about(settings, name, wanted)))
    if settings.height:
        about = {
            "long_name": "use of the ground",
            "flag_values": [0, 1, 2, 3],
            "flag_meanings": "unused train validation test",
        }
        layers.append(Layer("split", "uint8", 0, attributes=about))
    runs = [ground.runs for ground in sources.grounds]
    return Template(
        tuple(ground.grid for ground in sources.grounds),
        tuple(layers),
        settings.embeddings.years,
        settings.cube,
        f"{TITLE}{settings.name}",
        tuple(runs) if any(run is not None for run in runs) else (),
    )


_GEOMETRY = {
    "cog": "native pixels of the AlphaEarth tiles",
    "index": "native pixels of the AlphaEarth tiles",
    "mosaic": "the global mosaic in degrees, resampled nearest from the UTM tiles",
    "earthengine": "pixels of the Earth Engine export",
}


def _embedding(settings: RegionSettings) -> Layer:
    about = {
        "long_name": "AlphaEarth Foundations embedding, as its int8 code",
        "comment": "u = code / 127.5; value = u * |u|; -128 is nodata, in all bands",
        "units": "1",
        "source": settings.embeddings.source,
        "geometry": _GEOMETRY[settings.embeddings.source],
        "attribution": embeddings.ATTRIBUTION,
        "embedding_version": embeddings.VERSION,
    }
    bands = embeddings.BAND_NAMES
    return Layer("embedding", "int8", embeddings.NODATA, timed=True, bands=bands, attributes=about)


def _about(settings: RegionSettings, name: str, wanted: HeightSettings) -> dict[str, Any]:
    kind = {"dsm": "surface", "dtm": "terrain"}[wanted.surface]
    converted = name == "prior" and settings.height is not None and wanted.convert
    datum = settings.height.vertical_datum if converted and settings.height else None
    return {
        "long_name": f"{'reference' if name == 'height' else 'prior'} height of the {kind}",
        "standard_name": "surface_altitude",
        "units": "m",
        "surface": wanted.surface,
        "vertical_datum": datum or wanted.vertical_datum,
        "vertical_datum_of_source": wanted.vertical_datum,
        "epoch": wanted.epoch or "unknown",
    }


def plan(run: Run) -> Plan:
    """What ingest would read and write, from headers alone.

    Raises:
        InputError: bad input; see `sources.scan`.
    """
    sources = scan(run.settings)
    made, reader = template(run.settings, sources), Reader(sources)
    if not run.options.overwrite:
        _check(run, made, sources)
    shards = _shards(run.settings, made, reader)
    pending = shards if run.options.overwrite else run.ledger("cube").pending(shards)
    return Plan(
        "ingest",
        {
            **_extent(sources, made),
            "shards": len(shards),
            "pending": len(pending),
            "shard_px": made.cut.shard,
            **_volumes(made, reader, pending),
            "peak_worker_bytes": _BASE_BYTES + _TASK_SHARE * max(_raw(made, s) for s in shards),
        },
    )


_BASE_BYTES = 300_000_000
"""A worker before its first task."""
_TASK_SHARE = 3
"""A task's peak over the raw bytes of its shard, at most; see tests/benchmarks/RESULTS.md."""
_CODES, _HEIGHTS = 1.6, 1.4
"""Compression of real codes, measured; of float32 heights, roughly."""


def _extent(sources: Sources, made: Template) -> dict[str, Any]:
    """The groups, and the files that they are made from."""
    files = sources.files
    groups = [
        {
            "name": grid.name,
            "crs": grid.crs,
            "resolution": grid.resolution,
            "shape": list(grid.shape),
            "bounds": list(grid.bounds),
        }
        for grid in made.grids
    ]
    return {
        "groups": groups,
        "years": list(made.years),
        "tiles": len({tile for ground in sources.grounds for tile in ground.embeddings.tiles}),
        "covered_by_tiles": {year: _covered(sources, made, year) for year in made.years},
        "height_rasters": len(files["height"]),
        "prior_rasters": len(files["prior"]),
        **_shifts(sources),
    }


def _shifts(sources: Sources) -> dict[str, Any]:
    """How the prior's heights are brought to the datum of `height`."""
    shifts = [g.prior.shift for g in sources.grounds if g.prior and g.prior.shift]
    if not shifts:
        return {}
    first = shifts[0]
    known = "accuracy unknown" if first.accuracy is None else f"to {first.accuracy:g} m"
    return {
        "prior_converted": f"{first.source} to {first.target} by {first.operation} ({known})",
        **({"prior_grids": list(first.grids)} if first.grids else {}),
    }


def _volumes(made: Template, reader: Reader, pending: Sequence[Shard]) -> dict[str, int]:
    """Bytes of what is left to do: of pixels, and about what they take compressed."""
    read, written, packed_read, packed_written = 0, 0, 0.0, 0.0
    for shard in pending:
        ratio = _CODES if shard.layer == "embedding" else _HEIGHTS
        from_source, raw = reader.bytes_to_read(shard), _raw(made, shard)
        read, written = read + from_source, written + raw
        packed_read += from_source / ratio
        packed_written += min(raw, max(from_source, 1)) / ratio
    return {
        "bytes_to_read": round(packed_read),
        "bytes_to_write": round(packed_written),
        "raw_bytes_to_read": read,
        "raw_bytes_to_write": written,
    }


def _covered(sources: Sources, made: Template, year: int) -> float:
    """Share of the ground to be made that lies under some tile of a year, to about a thousandth."""
    covered = total = 0
    for ground in sources.grounds:
        every = max(max(ground.grid.shape) // 1000, 1)
        under = np.zeros([-(-size // every) for size in ground.grid.shape], dtype=bool)
        for tile in ground.embeddings.tiles:
            place = tile.reaches(ground.grid) if tile.year == year else None
            if shared := place and place.intersect(whole(ground.grid.shape)):
                _mark(under, shared, every)
        wanted = np.zeros_like(under)
        for region in squares(ground.grid.shape, made.cut.shard, ground.runs):
            _mark(wanted, region, every)
        covered, total = covered + int((under & wanted).sum()), total + int(wanted.sum())
    return round(covered / max(total, 1), 4)


def _mark(board: NDArray[np.bool_], region: Region, every: int) -> None:
    rows, cols = region.slices
    board[-(-rows.start // every) : -(-rows.stop // every),
          -(-cols.start // every) : -(-cols.stop // every)] = True  # fmt: skip


def _raw(made: Template, shard: Shard) -> int:
    layer = made.layer(shard.layer)
    return shard.region.size * max(len(layer.bands), 1) * np.dtype(layer.dtype).itemsize


def _shards(settings: RegionSettings, made: Template, reader: Reader) -> list[Shard]:
    """Every shard of the cube, with what it is made from."""
    how = {layer.name: fingerprint(height_settings(settings, layer.name)) for layer in made.layers}
    return [
        replace(shard, inputs=fingerprint([reader.inputs(shard), how[shard.layer]]))
        for shard in cube_shards(made)
    ]


def _check(run: Run, made: Template, sources: Sources) -> None:
    """Meet settings, a grid or files that are not those the cube was begun with.

    Raises:
        InputError: shows what differs.
    """
    run.ledger("cube").check(cube_settings(run.settings), "ingest")
    refuse_other_meaning(run.ledger("cube"), run.settings)
    found = find(run.cube)
    if found is None or not run.ledger("cube").done():
        return
    old = Template.described(found["template"])
    before, now = ({grid.name: grid for grid in each.grids} for each in (old, made))
    if before != now:
        lines = [
            f"{name}: {list(before[name].bounds) if name in before else None} -> "
            f"{list(now[name].bounds) if name in now else None}"
            for name in sorted(before | now)
            if before.get(name) != now.get(name)
        ]
        raise InputError(
            f"{run.cube.uri} was begun with another grid:\n  "
            + "\n  ".join(lines)
            + "\nwhere tiles fix the grid, one that comes later moves it: give `aoi` or `grid` and "
            "run with --overwrite, or leave the tile out"
        )
    check_growth(run.cube, replace(old, ground=()), replace(made, ground=()))
    _refuse_lost(run, sources)
    check_growth(run.cube, old, made)


def _refuse_lost(run: Run, sources: Sources) -> None:
    """Files may come later; one that is gone may be a disk that is not there today."""
    ledger = run.ledger("cube")
    if not ledger.done() or not ledger.store.exists(SOURCES):
        return
    if lost := sources.lacks(Sources.from_bytes(ledger.store.read(SOURCES))):
        raise InputError(
            f"{len(lost)} of the files that the cube was made from are no longer there, or no "
            "longer named:\n  "
            + "\n  ".join(lost[:10])
            + "\nput them back (files can be added beside them), or run with --overwrite to make "
            "the cube without them"
        )


def execute(run: Run) -> Outcome:
    """Write every pending shard of the cube.

    Raises:
        InputError: bad input, changed settings, or a region without any valid pixel.
    """
    sources = scan(run.settings)
    made, reader = template(run.settings, sources), Reader(sources)
    ledger = run.ledger("cube")
    if run.options.overwrite:
        run.discard(ledger.store, run.ledger("split").store)
        remove_tree(run.cube)
    else:
        finish_growing(run.cube)
        _check(run, made, sources)
        _drop_unmade(run, made)
    tree = create(run.cube, made)
    ledger = ledger.begin(cube_settings(run.settings) | {"cube_identity": tree.identity})
    data = sources.to_bytes()
    asked = json.dumps(sources_asked(run.settings), indent=1).encode()
    for name, record in ((SOURCES, data), (ASKED, asked)):
        if not ledger.store.exists(name) or ledger.store.read(name) != record:
            ledger.store.write(name, record)
    task = Ingest(
        run.cube.uri, tree.identity, tree.version, ledger.store.uri, ledger.key, digest(data)
    )
    outcome = carry_out(run, "ingest", ledger, _shards(run.settings, made, reader), task)
    if not outcome.failed:
        _refuse_empty(ledger, made)
    return outcome


def _drop_unmade(run: Run, made: Template) -> None:
    """Remove a cube of another plan that nothing was made of yet: it need not stay as it was."""
    found = find(run.cube)
    if found is None or run.ledger("cube").done():
        return
    if not made.extends(replace(Template.described(found["template"]), title=made.title)):
        remove_tree(run.cube)


def _refuse_empty(ledger: Ledger, made: Template) -> None:
    for layer in ("embedding", "height"):
        if layer not in {known.name for known in made.layers}:
            continue
        receipts = ledger.receipts(shard.name for shard in made.shards(layer))
        if not any(receipt.valid for receipt in receipts):
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
    version: str
    """Of the cube's template."""
    ledger: str
    key: str
    sources: str
    """Digest of the record of the sources."""

    def __call__(self, shard: Shard) -> Receipt:
        """Read, write, leave the receipt."""
        started = time.monotonic()
        ledger = Ledger(Store(self.ledger))
        tree, reader = _opened(self.cube, self.identity, self.version, self.ledger, self.sources)
        values = reader.read(shard)
        valid = embeddings.valid(values) if shard.layer == "embedding" else ~np.isnan(values)
        receipt = receipt_for(shard, values, tree.write(shard, values), valid, self.key, started)
        ledger.leave(receipt)
        return receipt


@lru_cache(maxsize=4)
def _opened(
    cube: str, _identity: str, _version: str, ledger: str, sources: str
) -> tuple[Tree, Reader]:
    """Once a worker, state of the cube and record of the sources."""
    data = Store(ledger).read(SOURCES)
    if digest(data) != sources:
        raise OSError(f"{ledger}/{SOURCES} was replaced by another driver; run again")
    return open_tree(Store(cube)), Reader(Sources.from_bytes(data))
