"""What the sums of all shards say: metrics.json, its tables as CSV, a STAC item and the page."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight import embeddings
from aeheight.blocks import Gathered
from aeheight.catalogue import Origin, Page, report_item
from aeheight.coregistration import Facets
from aeheight.correlation import Variogram
from aeheight.criteria import Criterion
from aeheight.crossings import Crossings
from aeheight.figures import Maps
from aeheight.intervals import Intervals
from aeheight.metrics import Scatter, Stats
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger, versions
from aeheight.report import Prediction, Report, render
from aeheight.rows import base_name, judged_split
from aeheight.seams import SHARE
from aeheight.sheets import SHEETS, sheets
from aeheight.shift import shift
from aeheight.sources import ClassMaps, Sources
from aeheight.steps.estimate import sessions
from aeheight.steps.ground import CORRELATED, tells
from aeheight.steps.ingest import SOURCES
from aeheight.steps.parts import CLASSES, read_part, thin
from aeheight.steps.run import Run
from aeheight.steps.tables import (
    Sums,
    by_class,
    by_split,
    calibration,
    chosen_blocks,
    confidence,
    coregistration,
    correlation,
    intervals,
    judged_heights,
    of_zone,
    regression,
    seams,
    skill,
    zones,
)
from aeheight.store import Store
from aeheight.sums import merge_tables
from aeheight.template import Shard, Template
from aeheight.windows import Lattice, Region

ITEM = "item.json"
FILES = {"metrics.json": "all figures, and where they come from", **SHEETS}
"""The figures as files: names, and what they hold."""
_METRICS, _PAGE = "metrics.json", "index.html"
REPORT = (_PAGE, ITEM, *FILES)
"""What `summarise` writes under `report`."""
_ARCHITECTURES = {"ridge": "Ridge", "unet": "U-Net", "unetplusplus": "U-Net++"}


def summarise(
    run: Run,
    cube: Template,
    heights: Template,
    year: int,
    shards: Sequence[Shard],
    checkpoint: Checkpoint,
    criteria: Mapping[str, Criterion],
    lines: Mapping[str, int],
    made_from: str,
) -> None:
    """Merge the parts of all shards and write the report.

    Args:
        run: where to read the parts and write the report.
        cube: its template.
        heights: the map's template.
        year: that is judged.
        shards: in any order; they are merged by name, which fixes the last bits of the moments.
        checkpoint: of the map.
        criteria: what the tables divide ground by.
        lines: the map's seams, and pixels from one to the next.
        made_from: what tells this report from others, see `is_made_from`.
    """
    merged = _Merged()
    sums = merge_tables(merged.take(run.ledger("report").current(), cube, shards))
    metrics = _metrics(run, cube, year, sums, merged, checkpoint, criteria)
    metrics["seams"] = seams(merged.crossings, lines)
    metrics["provenance"]["made_from"] = made_from
    files = {_METRICS: json.dumps(metrics, indent=1, allow_nan=False).encode()}
    files |= sheets(metrics)
    files[_PAGE] = render(_report(run, cube, heights, sums, checkpoint, metrics, merged)).encode()
    files = {ITEM: _item(run, cube, heights, year, metrics, files), **files}
    run.report.remove(_PAGE)
    for name, content in files.items():  # the page last: where it is, all is
        run.report.write(name, content)


def is_made_from(report: Store, made_from: str) -> bool:
    """Whether a whole report lies there that was made from the same sums and settings."""
    if not report.exists(_PAGE):
        return False
    with suppress(FileNotFoundError, ValueError, LookupError):
        told: object = json.loads(report.read(_METRICS))["provenance"]["made_from"]
        return told == made_from
    return False


class _Merged:
    """What the parts of all shards come to, besides the sums."""

    def __init__(self) -> None:
        self.pictures: list[tuple[Shard, Mapping[str, NDArray[Any]]]] = []
        self.variograms = dict.fromkeys(CORRELATED, Variogram.zero())
        self.intervals: dict[str, Intervals] = {}
        self.blocks = Gathered()
        self.facets = Facets.zero()
        self.crossings: dict[str, Crossings] = {}

    def take(self, ledger: Ledger, cube: Template, shards: Sequence[Shard]) -> Iterator[Sums]:
        """Add up all parts but the sums, which are handed on one table at a time.

        Each of those has its histograms: all of them at once would not fit into memory.
        """
        zones = [grid.name for grid in cube.grids]
        for shard in sorted(shards, key=lambda shard: shard.name):
            part = read_part(ledger, shard)
            for name, pairs in part.variograms.items():
                self.variograms[name] += pairs
            for name, held in part.intervals.items():
                self.intervals[name] = self.intervals.get(name, Intervals.zero()) + held
            for name, crossed in part.crossings.items():
                self.crossings[name] = self.crossings.get(name, Crossings.zero()) + crossed
            self.blocks.add(part.blocks)
            self.facets += part.facets
            self.pictures.append((shard, part.pictures))
            yield {**part.sums, **of_zone(part.sums, zones.index(shard.group))}


def _metrics(
    run: Run,
    cube: Template,
    year: int,
    sums: Sums,
    merged: _Merged,
    checkpoint: Checkpoint,
    criteria: Mapping[str, Criterion],
) -> dict[str, Any]:
    here = checkpoint.provenance.cube == run.open_cube().identity
    heights = judged_heights(sums)
    trained = heights["train"] if here and not checkpoint.provenance.also else None
    buffer = run.settings.split.buffer if here and heights["train"].n else None
    names = ["mean", "ridge"]
    names += ["kernel"] * (checkpoint.kernel is not None) + ["prior"] * tells(cube, "prior")
    baselines = {name: by_split(sums, name) for name in names}
    reach = correlation(merged.variograms, sums, cube, buffer)
    blocks = chosen_blocks(merged.blocks.total(), run.settings, reach)
    return {
        "model": by_split(sums, "model"),
        "baselines": baselines,
        "skill": skill(by_split(sums, "model"), baselines),
        "regression": regression(sums),
        "by": by_class(sums, criteria, run.settings.evaluate.classes),
        "intervals": intervals(merged.intervals, criteria),
        "zones": list(zones(cube, sums)),
        "shift": shift(heights, trained),
        "correlation": reach,
        "confidence": confidence(blocks, run.settings, sums),
        "coregistration": coregistration(blocks, merged.facets),
        "provenance": _provenance(run, cube, year, checkpoint),
    }


def _provenance(run: Run, cube: Template, year: int, checkpoint: Checkpoint) -> dict[str, Any]:
    files = Sources.from_bytes(run.ledger("cube").store.read(SOURCES)).files
    classes = ClassMaps.from_bytes(run.ledger("report").store.read(CLASSES)).files
    settings = run.settings
    assert settings.height is not None

    return {
        "region": settings.name,
        "year": year,
        "reference": settings.height.model_dump(mode="json")
        | {"epoch": settings.height.epoch or "unknown", "files": files["height"]},
        "prior": settings.prior
        and settings.prior.model_dump(mode="json")
        | {"epoch": settings.prior.epoch or "unknown", "files": files["prior"]},
        "classes": classes,
        "embeddings": {
            "version": embeddings.VERSION,
            "attribution": embeddings.ATTRIBUTION,
            "disclosure": embeddings.DISCLOSURE,
            "files": files["embeddings"],
        },
        "grids": {
            grid.name: {"crs": grid.crs, "resolution": grid.resolution, "bounds": list(grid.bounds)}
            for grid in cube.grids
        },
        "model": {
            "architecture": checkpoint.model.architecture,
            "corrects": "kernel" if checkpoint.kernel else checkpoint.base,
            "trust": checkpoint.trust.to_dict() if checkpoint.weights else None,
            "checkpoint": checkpoint.digest,
            "seed": checkpoint.model.seed,
            "trained_on_cube": checkpoint.provenance.cube,
            "trained_on_split": checkpoint.provenance.split,
            "trained_by_version": checkpoint.provenance.code_version,
        },
        "settings": settings.model_dump(mode="json")
        | {"model": checkpoint.model.model_dump(mode="json")}
        | {"predict": (run.ledger("heights").settings() or {}).get("predict")},
        "versions": versions(),
        "definitions": "d = predicted - reference (between zones: first - second); std with ddof "
        "0; LE90 = P90 of |d|",
    }


_MEDIA = {
    "html": ("text/html", ("overview", "metadata")),
    "json": ("application/json", ("metadata", "statistics")),
    "csv": ("text/csv", ("metadata", "statistics")),
}
"""Media type and roles, by the end of a name."""


def _item(
    run: Run,
    cube: Template,
    heights: Template,
    year: int,
    metrics: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> bytes:
    """The report's STAC item: the figures of the judged split, and all files."""
    split, about = judged_split(metrics["model"]), heights.layer("height").attributes
    figures = {
        "split": split,
        **metrics["model"][split],
        "baselines": {name: table[split] for name, table in metrics["baselines"].items()},
        "skill": metrics["skill"][split],
        "confidence": metrics["confidence"],
        "intervals": metrics["intervals"].get("model", {}).get(split),
    }
    pages = [
        Page(
            f"./{name}",
            FILES.get(name, "the report"),
            *_MEDIA[name.rpartition(".")[2]],
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        for name, content in files.items()
    ]
    origin = Origin(
        run.settings.name,
        str(about.get("surface", "unknown")),
        str(about.get("vertical_datum", "unknown")),
        str(about.get("checkpoint", "unknown")),
        f"Heights predicted by aeheight from AlphaEarth embeddings, judged against a reference. "
        f"{embeddings.ATTRIBUTION}",
        {"aeheight": versions()["aeheight"]},
    )
    return report_item(cube.grids, year, figures, pages, origin)


def _report(
    run: Run,
    cube: Template,
    heights: Template,
    sums: Sums,
    checkpoint: Checkpoint,
    metrics: Mapping[str, Any],
    merged: _Merged,
) -> Report:
    judged = judged_split(metrics["model"])
    stats, scatter = sums[f"model/{judged}"], sums[f"scatter/{judged}"]
    assert isinstance(stats, Stats)
    assert isinstance(scatter, Scatter)
    kind = _ARCHITECTURES[checkpoint.model.architecture]
    network = f" ({checkpoint.model.encoder})" if checkpoint.weights else ""
    left_out = bool(checkpoint.weights) and not checkpoint.corrects
    cost, remarks = _told(run, checkpoint)
    return Report(
        name=run.settings.name,
        metrics=metrics,
        model=f"the map ({base_name(metrics)} alone)" if left_out else kind + network,
        maps=[_maps(cube, grid.name, merged.pictures) for grid in cube.grids],
        scatter=scatter.dense(trim=0.0005) if stats.n else None,
        errors=stats.errors() if stats.n else None,
        calibration=calibration(merged.intervals, judged),
        files=FILES | {ITEM: "the same as a STAC item"},
        history=checkpoint.history,
        prediction=_prediction(run, heights, checkpoint),
        cost=cost,
        notes=remarks + _notes(run, checkpoint),
    )


def _prediction(run: Run, heights: Template, checkpoint: Checkpoint) -> Prediction | None:
    """How the map was computed, from what its ledger says; None where that says too little."""
    ledger = run.ledger("heights")
    settings = (ledger.settings() or {}).get("predict") or {}
    window, halo, blend = (settings.get(name) for name in ("window", "halo", "blend"))
    if window is None or halo is None:
        return None
    lattices = {g.name: Lattice(g.shape, window, halo, blend or 0) for g in heights.grids}
    shards = heights.shards("height")
    windows = sum(lattices[shard.group].count(shard.region) for shard in shards)
    return Prediction(
        window_px=window,
        halo_px=halo,
        extra=windows * window**2 / sum(shard.region.size for shard in shards),
        seams=checkpoint.seams,
        limit=None if checkpoint.rmse is None else SHARE * checkpoint.rmse,
        sessions=sessions(ledger.store),
    )


def _maps(
    cube: Template, group: str, pictures: Sequence[tuple[Shard, Mapping[str, NDArray[Any]]]]
) -> Maps:
    grid = cube.grid(group)
    every = thin(grid.shape)
    shape = tuple(-(-size // every) for size in grid.shape)
    whole: dict[str, NDArray[Any]] = {
        "reference": np.full(shape, np.nan, np.float32),
        "predicted": np.full(shape, np.nan, np.float32),
        "use": np.zeros(shape, np.uint8),
    }
    for name in ("novelty", "spread"):
        if any(name in thinned for _, thinned in pictures):
            whole[name] = np.full(shape, np.nan, np.float32)
    for shard, thinned in pictures:
        if shard.group != group:
            continue
        row, col = -(-shard.region.row // every), -(-shard.region.col // every)
        for name, values in thinned.items():
            if values.size:
                place = Region(row, col, *values.shape)
                whole[name][place.slices] = values
    height, width = grid.pixel_metres()
    return Maps(
        group=group,
        crs=grid.crs,
        bounds=grid.bounds,
        pixel=(width * every, height * every),
        reference=whole["reference"],
        predicted=whole["predicted"],
        difference=whole["predicted"] - whole["reference"],
        split=whole["use"],
        novelty=whole.get("novelty"),
        spread=whole.get("spread"),
    )


def _told(run: Run, checkpoint: Checkpoint) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """What each step cost, and what its workers remarked, from the receipts.

    The seconds are those of tasks; a worker has two at hand, so they are more than its own.
    """
    cost: dict[str, dict[str, float | None]] = {}
    remarks: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    for step, ledger in (("ingest", "cube"), ("predict", "heights"), ("evaluate", "report")):
        current = run.ledger(ledger).current()
        shards, pixels, peak, seconds = 0, 0, 0, 0.0
        for receipt in current.receipts(current.done()):
            shards, pixels = shards + 1, pixels + receipt.pixels
            seconds += receipt.seconds
            peak = max(peak, receipt.peak)
            remarks.update(receipt.remarks)
            devices.update([receipt.device] if receipt.device else [])
        cost[step] = {
            "shards": shards,
            "task_seconds": round(seconds, 1),
            "pixels_per_task_second": round(pixels / seconds) if seconds else None,
            "worker_bytes": peak or None,
        }
        if step == "ingest" and (trained := checkpoint.history[-1:]):
            cost["train"] = {"task_seconds": trained[0].get("seconds")}
    told = [f"{remark} ({count} shards)." for remark, count in sorted(remarks.items())]
    if len(devices) > 1:
        shares = ", ".join(
            f"{count} shards on {device}" for device, count in sorted(devices.items())
        )
        told.append(f"Predicted on unlike devices, which round unlike: {shares}.")
    return cost, told


def _notes(run: Run, checkpoint: Checkpoint) -> list[str]:
    notes = [run.settings.note] if run.settings.note else []
    height = run.settings.height
    assert height is not None
    if checkpoint.provenance.cube != run.open_cube().identity:
        notes.append(
            "The model was trained on another cube: the split shown here is this region's, not the "
            "one it was trained with. Where that cube holds ground of this region, its test pixels "
            "may have been training pixels. The mean and ridge baselines are those of its training "
            "ground."
        )
    if checkpoint.base == "prior":
        notes.append(
            "The model corrects the prior, so its errors follow the prior's where the embeddings "
            "say little; judge it against the row of the prior."
        )
    if height.epoch is None:
        notes.append(
            "The epoch of the reference is unknown: what was built, felled or grown "
            "between it and the embeddings' year counts as error."
        )
    if (height.surface, height.vertical_datum) != (
        checkpoint.provenance.surface,
        checkpoint.provenance.vertical_datum,
    ):
        notes.append(
            f"The model gives {checkpoint.provenance.surface} heights in "
            f"{checkpoint.provenance.vertical_datum}; the reference is {height.surface} in "
            f"{height.vertical_datum}: part of the difference is that."
        )
    return notes
