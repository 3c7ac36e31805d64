"""Export: a finished map to files that every GIS opens, one tile a task.

A task writes a COG for each layer of its tile and the STAC item that describes them. What is made
once for all tiles (pictures, the collection) is `publish`'s. What an export is to hold, `wanted`'s.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from aeheight.catalogue import COLLECTION
from aeheight.cluster import Outcome
from aeheight.cube import find, open_tree
from aeheight.errors import InputError
from aeheight.receipts import Ledger
from aeheight.settings import ExportSettings, fingerprint
from aeheight.steps import area
from aeheight.steps.publish import publish
from aeheight.steps.pyramids import (
    PYRAMIDS,
    Halve,
    in_pyramids,
    metadata_of,
    task_bytes,
    write_metadata,
)
from aeheight.steps.run import Plan, Run, carry_out
from aeheight.steps.tiles import FOLDER, LEDGER, ONCE, Check, Export, files_of
from aeheight.steps.wanted import Wanted
from aeheight.template import Shard

_FOLDERS = {LEDGER: FOLDER, area.LEDGER: area.FOLDER}
_PROCESS_BYTES = 500_000_000
"""Upper bound for two tasks at hand; measured with one: 175 MB, of a mosaic 360 MB."""
_log = logging.getLogger(__name__)


def plan(run: Run) -> Plan:
    """What export would write, from metadata alone; the files are smaller than its raw bytes.

    Raises:
        InputError: the map is not whole, or was exported with other settings.
    """
    work, ledger = Wanted.of(run), run.ledger(LEDGER)
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
    if work.mosaics:
        grids = [mosaic.grid for mosaic in work.mosaics]
        facts["mosaics"] = [
            f"{g.crs} ({g.shape[0]} x {g.shape[1]} px of {g.resolution:g})" for g in grids
        ]
    pixels = sum(shard.region.size * count for shard, count in (layers | squares).items())
    return Plan(
        "export",
        facts
        | {
            "bytes_to_write": 4 * pixels * 4 // 3,
            "temporary_bytes_per_task": 4 * 3 * max((t.region.size for t in tiles), default=0),
            "peak_worker_bytes": _PROCESS_BYTES + 2 * task_bytes(work.pyramid) * bool(later),
        },
    )


def execute(run: Run) -> Outcome:
    """Export every pending tile, then the pictures and the collection.

    Raises:
        InputError: the map is not whole, or was exported with other settings.
    """
    work, ledger, place = Wanted.of(run), run.ledger(LEDGER), run.store.child(FOLDER)
    if work.settings.area is not None:
        return _clip(run, work)
    if run.options.overwrite:
        run.discard(ledger.store, place, run.ledger(area.LEDGER).store)
    ledger = ledger.begin(work.begun_with())
    work.asked.record(ledger.store)
    tiles, later = work.tiles(), work.stages()
    shards, once = [*tiles, *chain.from_iterable(later)], work.once(tiles)
    forget(run, _outgrown(ledger, [*shards, once, *([metadata_of(work.pyramid)] * bool(later))]))
    if ledger.pending([*shards, once]):
        _withdraw(run)
    task = Export(
        work.shown,
        place.uri,
        ledger.store.uri,
        ledger.key,
        work.settings,
        work.origin(),
        work.mosaics,
    )
    outcome = carry_out(run, "export", ledger, tiles, task)
    if later and not outcome.failed:
        outcome = _halve(run, work, ledger, later, outcome)
    if not outcome.failed and (ledger.pending([once]) or not place.exists(COLLECTION)):
        publish(run, task, work.tree, ledger, tiles, once)
    return outcome


def _area(run: Run, work: Wanted) -> tuple[Ledger, area.Clip, list[Shard]]:
    """Receipts, task and shards of an area; what they are made from is all in their inputs."""
    ledger, place = run.ledger(area.LEDGER), run.store.child(area.FOLDER)
    ledger = replace(ledger, key=fingerprint({}))
    wanted = area.Area.of(run.settings)
    task = area.Clip(
        work.shown, wanted, place.uri, ledger.store.uri, ledger.key, work.settings, work.origin()
    )
    found = wanted.regions(work.tree.template.grids, work.ground.holds)
    pieces = [
        Shard(zone, area.LEDGER, year, region)
        for zone, region in found
        for year in work.tree.template.years
    ]
    return ledger, task, [task.shard(piece, _shows(work, piece)) for piece in pieces]


def _shows(work: Wanted, shard: Shard) -> str:
    """Fingerprint of all that the files of an area's shard show, whatever the area."""
    if all(grid.name != shard.group for grid in work.tree.template.grids):
        return ""
    cube = work.cube.identity if work.cube else ""
    inputs = work.inputs(shard.group, shard.year, shard.region)
    return fingerprint([work.tree.identity, cube, work.said(work.shown.layers()), inputs])


def _plan_area(run: Run, work: Wanted) -> Plan:
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


def _clip(run: Run, work: Wanted) -> Outcome:
    ledger, task, shards = _area(run, work)
    if run.options.overwrite:
        run.discard(ledger.store, run.store.child(area.FOLDER))
    ledger = ledger.begin({})
    wanted = {shard.name for shard in shards}
    others = [n for n in area.outdated(ledger, lambda s: _shows(work, s)) if n not in wanted]
    if others:
        _log.warning(
            "removed the files of %d shards of earlier areas, which show the map or its reference "
            "as it no longer is: %s; export those areas again",
            len(others),
            ", ".join(others),
        )
        forget(run, others, area.LEDGER)
    return carry_out(run, "area", ledger, shards, task)


def _halve(
    run: Run, work: Wanted, ledger: Ledger, stages: Sequence[list[Shard]], before: Outcome
) -> Outcome:
    """Make the pyramids; the outcome of this and of what was done before."""
    place, pyramid = run.store.child(FOLDER), work.pyramid
    _begin_pyramids(run, work, ledger, stages)
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


def _begin_pyramids(run: Run, work: Wanted, ledger: Ledger, stages: Sequence[list[Shard]]) -> None:
    """Write the metadata, where it is not that of these pyramids; what others left goes first."""
    metadata, place = metadata_of(work.pyramid), run.store.child(FOLDER)
    if not ledger.pending([metadata]):
        return
    wanted = {square.name: square.inputs for square in chain.from_iterable(stages)}
    found = {name: made for name, made in ledger.done().items() if in_pyramids(name)}
    stale = [name for name, made in found.items() if made != wanted.get(name)]
    forget(run, stale)
    if len(stale) == len(found):  # nothing there has a receipt
        place.child(PYRAMIDS).remove()
    write_metadata(work.pyramid, place, ledger)


def _outgrown(ledger: Ledger, wanted: Iterable[Shard]) -> list[str]:
    """What earlier mosaics of the same folders, or earlier pyramids, would leave beside the new."""
    names = {shard.name for shard in wanted}
    return [name for name in ledger.done() if name not in names]


def forget(run: Run, names: Sequence[str], label: str = LEDGER) -> None:
    """Remove the files and receipts of some tiles, or of areas.

    The catalogue goes first, and the receipts before the files: killed in between, nothing is
    called done that is not there.
    """
    if not names:
        return
    ledger, place = run.ledger(label).current(), run.store.child(_FOLDERS[label])
    found = [key for receipt in ledger.receipts(names) for key in files_of(receipt)]
    if label == LEDGER:
        _withdraw(run)
    ledger.forget(names)
    place.remove_many(found)


def _withdraw(run: Run) -> None:
    """Remove the collection and its receipt: where they lie, the export is whole."""
    run.store.child(FOLDER).remove_many([COLLECTION])
    run.ledger(LEDGER).forget([ONCE.name])


def as_made(run: Run) -> Run:
    """The run with the settings that its files were made with, for repair."""
    export = ExportSettings(**(run.ledger(LEDGER).settings() or {})["export"])
    return replace(run, settings=run.settings.model_copy(update={"export": export}))


def progress(run: Run) -> tuple[int, int] | None:
    """Tiles that are done, and all of them; None before the first, or where the map is gone."""
    ledger = run.ledger(LEDGER)
    begun = ledger.settings()
    if begun is None or find(run.store.child(f"{begun['export']['map']}.zarr")) is None:
        return None
    tree = open_tree(run.store.child(f"{begun['export']['map']}.zarr"))
    try:
        work = Wanted.with_map(as_made(run), tree)
    except InputError:  # its reference is no longer whole, or of an older map
        return 0, sum(shard.layer != ONCE.layer for shard in ledger.finished()) or 1
    shards = [*work.tiles(), *chain.from_iterable(work.stages())]
    left = len(shards) if begun["map"] != tree.identity else len(ledger.pending(shards))
    return len(shards) - left, len(shards)


def checks(run: Run) -> Iterator[tuple[str, Ledger, Check]]:
    """Label and receipts of what was exported, and the task that compares its files with them."""
    for label, folder in _FOLDERS.items():
        ledger = run.ledger(label)
        if ledger.settings() is not None:
            ledger = ledger.current()
            yield label, ledger, Check(run.store.child(folder).uri, ledger.store.uri, ledger.key)
