"""What an area takes: shards, bytes, memory, hours and money, by the plans of the steps.

    python -m tests.benchmarks.sizing [--areas 10000 100000 1000000] [--gpu-pixels-per-second 5e6]
        [--price-cpu-hour 0.04] [--price-gpu-hour 2.5] [--price-gb-month 0.02]

Shards, bytes and memory are what `--plan` of each step says of a square of that area at 45° north
(km², one year, pixels of 10 m, across UTM zones where it is that wide). The plans are real; what
they plan is made up: an index of embedding tiles, rasters that are headers alone (a height model
in cells of one degree, 30 m, as reference and as prior), and receipts without shards. No pixel is
read.

Hours are these figures times the rates of RESULTS.md, in hours of one core of that machine, with
sources and store on its disk: measure yours. The pixels a second of a GPU are an ASSUMPTION, since
none was measured; `aeheight predict --plan` times the GPUs that are there. Money is hours and store
times your prices, in your currency: requests, traffic and idle nodes are not in it.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import yaml
from affine import Affine

from aeheight.cube import create
from aeheight.grid import Bounds, reproject_bounds
from aeheight.novelty import Novelty
from aeheight.settings import ModelSettings, load_region
from aeheight.sources import Reader, scan
from aeheight.spread import Head, Spread
from aeheight.steps import evaluate, export, ingest, predict, train
from aeheight.steps.run import ASKED, Plan, Run, cube_settings, human_bytes, sources_asked
from tests.benchmarks import machine, markdown
from tests.benchmarks.planning import EDGE, sides_of
from tests.benchmarks.scale import pretend
from tests.checkpoints import checkpoint_of, wild_weights

YEAR = 2024
LON, LAT = 9.0, 45.0
"""Centre of the squares, degrees: the middle of UTM zone 32."""
EARTH = 6371.0
"""Radius, km."""
INGEST = 12.4
"""CPU seconds for a GB of raw bytes: RESULTS.md, `Tile to cube`."""
PREDICT = 5.29
"""CPU seconds for a megapixel without a GPU: RESULTS.md, `Prediction beside its bounds`."""
EVALUATE = 0.83
"""CPU seconds for a megapixel: RESULTS.md, `Evaluating`."""
GPU = 5e6
"""Pixels of the map a second and GPU: an assumption."""
FLOATS = 1.4
"""Compression of float32 heights, roughly, as the plan of ingest takes it."""
MB, GB = 1e6, 1e9
UNETPP = ModelSettings(architecture="unetplusplus")


@dataclass(frozen=True)
class Sized:
    """One area with the plans of its steps."""

    area: float
    """km²."""
    plans: Mapping[str, Mapping[str, Any]]
    """Facts, by step."""
    seconds: Mapping[str, float]
    """That each plan took."""
    pixels: int
    """Of the map."""

    @property
    def cube_bytes(self) -> int:
        """In the store, compressed."""
        return int(self.plans["ingest"]["bytes_to_write"])

    @property
    def map_bytes(self) -> int:
        """In the store, compressed."""
        return round(self.plans["predict"]["bytes_to_write"] / FLOATS)


def main() -> None:
    """Plan and print."""
    options = _options()
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}", flush=True)
    sized = []
    for area in options.areas:
        with TemporaryDirectory() as folder:
            sized.append(size(Path(folder), area))
        print(f"{area:,.0f} km² planned", file=sys.stderr, flush=True)
    print()
    print(table(sized, options))


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--areas", type=float, nargs="+", default=[1e4, 1e5, 1e6], help="km²")
    parser.add_argument(
        "--gpu-pixels-per-second", type=float, default=GPU, help="of one GPU; assumed, not measured"
    )
    for price, of in (("cpu-hour", "a core"), ("gpu-hour", "a GPU"), ("gb-month", "the store")):
        parser.add_argument(f"--price-{price}", type=float, help=f"of {of}, in your currency")
    return parser.parse_args(arguments)


def size(folder: Path, area: float) -> Sized:
    """Plan every step of a square, each after a pretence that the one before is done."""
    folder.mkdir(exist_ok=True)
    run = Run(load_region(write_region(folder, square(area)), []))
    facts: dict[str, Mapping[str, Any]] = {}
    seconds: dict[str, float] = {}
    steps: dict[str, tuple[Callable[[Run], Plan], Callable[[Run], None] | None]] = {
        "ingest": (ingest.plan, pretend_ingested),
        "train": (train.plan, pretend_predicted),
        "predict": (predict.plan, None),
        "evaluate": (evaluate.plan, None),
        "export": (export.plan, None),
    }
    for step, (plan, pretence) in steps.items():
        started = time.monotonic()
        facts[step] = plan(run).facts
        seconds[step] = time.monotonic() - started
        if pretence:
            pretence(run)
    layers = len(facts["predict"]["layers"])
    return Sized(area, facts, seconds, facts["predict"]["bytes_to_write"] // 4 // layers)


# --- what is made up ----------------------------------------------------------------------------


def square(area: float) -> Bounds:
    """West, south, east, north, degrees, of so many km² around the centre, as high as wide."""
    half = math.degrees(math.sqrt(area) / EARTH) / 2
    south, north = LAT - half, LAT + half
    sines = math.sin(math.radians(north)) - math.sin(math.radians(south))
    wide = math.degrees(area / EARTH**2 / sines) / 2
    return LON - wide, south, LON + wide, north


def write_region(folder: Path, aoi: Bounds) -> Path:
    """A region file with its index of tiles and its cells of heights."""
    pq.write_table(pa.Table.from_pylist([*tiles(aoi)]), folder / "index.parquet")
    for west, south in cells(aoi):
        write_header(folder / "dem" / f"n{south:02d}e{west:03d}.tif", west, south)
    height = {"source": "raster", "href": "dem", "surface": "dsm", "vertical_datum": "EPSG:3855"}
    settings = {
        "name": "sizing",
        "store": str(folder / "run"),
        "aoi": list(aoi),
        "embeddings": {"source": "index", "href": "index.parquet", "year": YEAR},
        "height": height,
        "prior": height,
        "predict": {"halo": 80},  # of the demo's network, as RESULTS.md has it
    }
    region = folder / "region.yaml"
    region.write_text(yaml.safe_dump(settings))
    return region


def tiles(aoi: Bounds) -> Iterator[dict[str, Any]]:
    """Rows of the index: tiles of 8192 px over the part of each zone that lies in the area."""
    west, south, east, north = aoi
    for zone in range(math.floor((west + 180) / 6) + 1, math.ceil((east + 180) / 6) + 1):
        left = zone * 6 - 186
        part = (max(west, left), south, min(east, left + 6), north)
        crs = f"EPSG:326{zone:02d}"
        utm = reproject_bounds(part, "EPSG:4326", crs)
        ends = [math.floor(v / EDGE) for v in utm[:2]] + [math.ceil(v / EDGE) for v in utm[2:]]
        for row in range(ends[1], ends[3]):
            for column in range(ends[0], ends[2]):
                yield tile(zone, crs, row, column)


def tile(zone: int, crs: str, row: int, column: int) -> dict[str, Any]:
    """A row of the index."""
    box = (column * EDGE, row * EDGE, (column + 1) * EDGE, (row + 1) * EDGE)
    name = f"xsizing{zone:02d}-{row:010d}-{column:010d}.tiff"
    return {
        "path": f"s3://bucket.invalid/annual/{YEAR}/{zone}N/{name}",
        "year": YEAR,
        "crs": crs,
        "utm_zone": f"{zone}N",
        **sides_of("utm", box),
        **sides_of("wgs84", reproject_bounds(box, crs, "EPSG:4326")),
    }


def cells(aoi: Bounds) -> Iterator[tuple[int, int]]:
    """West and south of the degrees that touch an area, and of their neighbours."""
    for south in range(math.floor(aoi[1]) - 1, math.ceil(aoi[3]) + 1):
        for west in range(math.floor(aoi[0]) - 1, math.ceil(aoi[2]) + 1):
            yield west, south


def write_header(path: Path, west: int, south: int) -> None:
    """A raster of one degree without a pixel in it: 1 arc second, some kB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=3600, width=3600, dtype="float32",
        crs="EPSG:4326", transform=Affine(1 / 3600, 0, west, 0, -1 / 3600, south + 1),
        nodata=-32768, tiled=True, blockxsize=512, blockysize=512, SPARSE_OK="TRUE",
    ):  # fmt: skip
        pass


def pretend_ingested(run: Run) -> None:
    """A cube whose every shard has a receipt, and a model."""
    sources = scan(run.settings)
    made = ingest.template(run.settings, sources)
    tree = create(run.cube, made)
    ledger = run.ledger("cube").begin(
        cube_settings(run.settings) | {"cube_identity": tree.identity}
    )
    ledger.store.write(ASKED, json.dumps(sources_asked(run.settings)).encode())
    pretend(ledger, ingest._shards(run.settings, made, Reader(sources)))


def pretend_predicted(run: Run) -> None:
    """A model that tells all layers, and a map whose every shard has a receipt."""
    head = Head(np.ones(64, np.int8), 0.01, 1.0)
    checkpoint = checkpoint_of(
        UNETPP, "prior", wild_weights(UNETPP), novelty=Novelty(np.ones((1, 64), np.int8), 1.0),
        spread=Spread(head, 0.0, 3.0, 1.6, 1, 40, 0.01),
    )  # fmt: skip
    run.model.write("best.ckpt", checkpoint.to_bytes())
    work = predict._Work.of(run)
    tree = create(run.heights, work.template)
    ledger = run.ledger("heights").begin(work.begun_with() | {"heights": tree.identity})
    pretend(ledger, work.shards(run))


# --- what is told -------------------------------------------------------------------------------


def table(sized: list[Sized], options: argparse.Namespace) -> str:
    """Markdown: a column an area."""
    head = ["", *(f"{one.area:,.0f} km²" for one in sized)]
    rows = [
        [label, *("-" if value is None else value for value in map(told, sized))]
        for label, told in lines(options)
    ]
    return markdown(head, [row for row in rows if set(row[1:]) != {"-"}])


Told = Callable[[Sized], str | None]


def lines(options: argparse.Namespace) -> Iterator[tuple[str, Told]]:
    """Label of each row, and what makes its cells; None where a price is not given."""
    yield "pixels of 10 m that are made, million", lambda s: _count(s.pixels / MB)
    yield "UTM zones", partial(_fact, "ingest", "groups", len)
    yield "embedding tiles read", partial(_fact, "ingest", "tiles", _count)
    for step in ("ingest", "predict", "evaluate", "export"):
        yield f"shards of {step}", partial(_fact, step, "shards", _count)
    yield "read by ingest (compressed)", partial(_fact, "ingest", "bytes_to_read", human_bytes)
    for step in ("predict", "evaluate"):
        yield f"read by {step} (decoded)", partial(_fact, step, "bytes_to_read", human_bytes)
    yield "cube in the store", lambda s: human_bytes(s.cube_bytes)
    yield "map in the store", lambda s: human_bytes(s.map_bytes)
    yield "files of export, at most", partial(_fact, "export", "bytes_to_write", human_bytes)
    for step in ("ingest", "predict", "evaluate", "export"):
        label = f"a worker's memory in {step}, at most"
        yield label, partial(_fact, step, "peak_worker_bytes", human_bytes)
    yield (
        "the driver's memory in train, at most",
        partial(_fact, "train", "peak_bytes", human_bytes),
    )
    yield from _hours(options)
    for step in ("ingest", "train", "predict", "evaluate", "export"):
        yield f"seconds of {step} --plan", lambda s, step=step: f"{s.seconds[step]:.1f}"


def _hours(options: argparse.Namespace) -> Iterator[tuple[str, Told]]:
    rate = options.gpu_pixels_per_second
    yield "core hours of ingest", lambda s: _count(ingest_hours(s))
    yield "core hours of evaluate", lambda s: _count(evaluate_hours(s))
    yield f"GPU hours of predict, at {rate / MB:g} Mpx/s", lambda s: _count(gpu_hours(s, rate))
    yield "or core hours of predict, without a GPU", lambda s: _count(predict_hours(s))
    core, gpu, store = options.price_cpu_hour, options.price_gpu_hour, options.price_gb_month
    yield (
        "money: cores for ingest and evaluate",
        partial(_priced, core, lambda s: ingest_hours(s) + evaluate_hours(s)),
    )
    yield "money: GPUs for predict", partial(_priced, gpu, lambda s: gpu_hours(s, rate))
    yield (
        "money: cube and map in the store, a month",
        partial(_priced, store, lambda s: (s.cube_bytes + s.map_bytes) / GB),
    )


def ingest_hours(sized: Sized) -> float:
    """Of one core."""
    return sized.plans["ingest"]["raw_bytes_to_write"] / GB * INGEST / 3600


def evaluate_hours(sized: Sized) -> float:
    """Of one core."""
    return sized.pixels / MB * EVALUATE / 3600


def predict_hours(sized: Sized) -> float:
    """Of one core."""
    return sized.pixels / MB * PREDICT / 3600


def gpu_hours(sized: Sized, rate: float) -> float:
    """Of one GPU that makes so many pixels of the map a second."""
    return sized.pixels / rate / 3600


def _fact(step: str, key: str, show: Callable[[Any], object], sized: Sized) -> str:
    return str(show(sized.plans[step][key]))


def _priced(price: float | None, amount: Callable[[Sized], float], sized: Sized) -> str | None:
    return None if price is None else _count(price * amount(sized))


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2g}"


if __name__ == "__main__":
    main()
