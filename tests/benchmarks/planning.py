"""Planning a country: 500 tiles from an index, over 10,000 shards, no pixel read.

    python -m tests.benchmarks.planning [--tiles 500] [--shard 1024]

Makes an index with the columns of the published one, as CSV and as GeoParquet: tiles of 8192 px
side by side in several UTM zones, among as many again elsewhere and in another year. Then times
`aeheight ingest --plan`, start of Python and all. The aim: under 10 s.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from aeheight.grid import Bounds, reproject_bounds
from tests.benchmarks import cpu_seconds, machine, markdown

EDGE = 81_920.0
"""Metres: of a tile."""
COLUMNS = 6
"""Tiles side by side in a zone: what six degrees hold at 45° north."""
ZONES = 6
ZONE, WEST, SOUTH = 31, 254_080.0, 4_500_480.0
"""Where the first tile lies: UTM zone, metres east and north."""
SIDES = ("west", "south", "east", "north")
AIM = 10.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", type=int, default=500)
    parser.add_argument("--shard", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    wanted = list(tiles(2024, options.tiles, ZONE))
    others = [*tiles(2023, options.tiles, ZONE), *tiles(2024, options.tiles, ZONE + 20)]
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {options.tiles} tiles wanted")
    rows = []
    with TemporaryDirectory() as folder:
        for index in write_index(Path(folder), [*wanted, *others]):
            region = write_region(index, wanted, options.shard)
            walls, cpus, facts = zip(*[plan(region) for _ in range(options.repeats)], strict=True)
            found = [facts[0].get(key, "?") for key in ("tiles", "shards")]
            rows.append([index.name, *found, float(median(walls)), float(median(cpus)), AIM])
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}\n")
    print(markdown(["index", "tiles", "shards", "wall s", "CPU s", "aim, wall s"], rows))


def tiles(year: int, count: int, zone: int) -> Iterator[dict[str, Any]]:
    """Rows of the index: six tiles wide, zone after zone, from 40° to 51° north."""
    in_a_zone = -(-count // ZONES)
    for number in range(count):
        place = zone + number // in_a_zone
        row, column = divmod(number % in_a_zone, COLUMNS)
        west, south = WEST + column * EDGE, SOUTH + row * EDGE
        utm = (west, south, west + EDGE, south + EDGE)
        crs = f"EPSG:326{place:02d}"
        name = f"{place}N/xbench{number:05d}-{row * 8192:010d}-{column * 8192:010d}.tiff"
        yield {
            "path": f"s3://bucket.invalid/annual/{year}/{name}",
            "year": year,
            "crs": crs,
            "utm_zone": f"{place}N",
            **sides_of("utm", utm),
            **sides_of("wgs84", reproject_bounds(utm, crs, "EPSG:4326")),
        }


def sides_of(kind: str, bounds: Bounds) -> dict[str, float]:
    """Columns of a box: `utm_west` and so on."""
    return {f"{kind}_{side}": value for side, value in zip(SIDES, bounds, strict=True)}


def write_index(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The same rows as CSV and as Parquet."""
    table = pa.Table.from_pylist(rows)
    pyarrow.csv.write_csv(table, folder / "aef_index.csv")
    pq.write_table(table, folder / "aef_index.parquet")
    return [folder / "aef_index.csv", folder / "aef_index.parquet"]


def write_region(index: Path, wanted: list[dict[str, Any]], shard: int) -> Path:
    """A region file around all the wanted tiles."""
    ends = (min, min, max, max)
    sides = zip(SIDES, ends, strict=True)
    box = [end(row[f"wgs84_{side}"] for row in wanted) for side, end in sides]
    settings = {
        "name": "country",
        "store": str(index.parent / "run"),
        "aoi": box,
        "embeddings": {"source": "index", "href": str(index), "year": 2024},
        "cube": {"shard": shard},
    }
    region = index.with_suffix(f"{index.suffix}.yaml")
    region.write_text(yaml.safe_dump(settings))
    return region


def plan(region: Path) -> tuple[float, float, dict[str, Any]]:
    """Wall seconds, CPU seconds, and what the plan says."""
    command = [sys.executable, "-m", "aeheight.cli", "ingest", str(region), "--plan", "--json"]
    wall, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if done.returncode:
        sys.exit(f"aeheight ingest --plan failed:\n{done.stdout}{done.stderr}")
    return wall, cpu, json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
