"""Every kind of source, shown: made, planned, ingested, opened with xarray, held to the truth.

    python -m pipelines.sources [--data ../shared/data] [NAME ...]

A case is a function that writes its sources and returns the settings of a region and a check. The
checks do not ask aeheight: they read the sources with rasterio, or know what was written.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rioxarray  # noqa: F401 (gives xarray objects `.rio`)
import xarray as xr
import yaml
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.warp import transform_bounds

from aeheight.cli import main as aeheight
from aeheight.embeddings import BANDS
from aeheight.errors import InputError
from pipelines import truth
from pipelines.source_files import write_exports, write_index, write_item, write_mosaic
from pipelines.world import World, make_world
from pipelines.world_files import write_tiles

REGION = Path(__file__).parent / "regions" / "two_zones.yaml"
EXACT = "wisconsin_10m/aef_wi_1km_2024_utm16n_int8_exact.tif"
SMALL = {"shard": 64, "chunk": 32}


class Skipped(Exception):  # noqa: N818
    """Why a case cannot be shown here."""


@dataclass(frozen=True)
class Place:
    """Where a case works."""

    name: str
    """The case's."""
    runs: Path
    """All that is made lies below it."""
    data: Path
    """Third-party data, only read."""
    size: int = 512
    """Edge of the world of two zones, pixels."""

    @property
    def folder(self) -> Path:
        """The case's own."""
        return self.runs / "sources" / self.name

    def find(self, name: str) -> Path:
        """A file of the third-party data.

        Raises:
            Skipped: it is missing.
        """
        path = self.data / name
        if not path.exists():
            raise Skipped(f"{path} is missing; name the folder of the data with --data")
        return path.resolve()

    def world(self) -> World:
        """The made-up world of two zones."""
        return make_world(self.runs / "two-zones-world", self.size, zones=2)


@dataclass(frozen=True)
class Region:
    """What a case prepared."""

    settings: dict[str, Any]
    """Of the region file, but for its name and store."""
    check: Callable[[xr.DataTree], Iterator[truth.Finding]]
    arrive: Callable[[], object] = lambda: None
    """What happens after the plan and before the ingest."""


# --- the cases ------------------------------------------------------------------------------------


def tile(place: Place) -> Region:
    """A real AlphaEarth tile, stored from the south."""
    source = place.find("wisconsin_10m/aef_format_bottomup_1024px.tif")
    settings = {"embeddings": _embeddings(source, 2024), "cube": {"shard": 512, "chunk": 256}}
    return Region(settings, partial(truth.same_codes, source))


def larger_grid(place: Place) -> Region:
    """A real raster of 98 x 99 pixels, placed in a larger grid."""
    source = place.find(EXACT)
    bounds = [358_080, 4_905_300, 359_680, 4_906_900]
    grid = {"crs": "EPSG:32616", "resolution": 10, "bounds": bounds}
    settings = {"grid": grid, "embeddings": _embeddings(source, 2024), "cube": SMALL}
    return Region(settings, partial(truth.same_codes, source))


def earthengine(place: Place) -> Region:
    """An export of Earth Engine, float64, in one file."""
    return _exported(place, [range(BANDS)])


def earthengine_bands(place: Place) -> Region:
    """The same export, in one file a band."""
    return _exported(place, [[band] for band in range(BANDS)])


def _exported(place: Place, files: Sequence[Sequence[int]]) -> Region:
    source = place.find(EXACT)
    write_exports(source, place.folder, files)
    settings = {"embeddings": _embeddings("*.tif", 2024, "earthengine"), "cube": SMALL}
    return Region(settings, partial(truth.same_codes, source))


def two_zones(place: Place) -> Region:
    """A made-up world across two UTM zones: tiles, a DSM in STAC, a prior in degrees."""
    world = place.world()
    settings = yaml.safe_load(REGION.read_text(encoding="utf-8"))
    sources = {"embeddings": world.embeddings, "height": world.height, "prior": world.prior}
    for key, path in sources.items():
        settings[key]["href"] = str(path)

    def check(cube: xr.DataTree) -> Iterator[truth.Finding]:
        yield from truth.same_zones(world, cube)
        yield from truth.same_heights(world, cube)

    return Region(settings, check)


def index(place: Place) -> Region:
    """The tiles of two zones from an index of thousands, planned before any of them is there."""
    world = place.world()
    write_index(place.folder / "aef_index.parquet", world.embeddings, "tiles", elsewhere=400)
    settings = {
        "aoi": list(transform_bounds(world.crs, "EPSG:4326", *world.bounds)),
        "embeddings": _embeddings("aef_index.parquet", 2021, "index"),
        "cube": {"shard": 256, "chunk": 128},
    }
    arrive = partial(shutil.copytree, world.embeddings, place.folder / "tiles")
    return Region(settings, partial(truth.same_zones, world), arrive)


def mosaic(place: Place) -> Region:
    """A Zarr in degrees like the global mosaic; two years."""
    codes = np.stack([_made_up((200, 300), seed) for seed in (1, 2)])
    y, x = write_mosaic(place.folder / "mosaic.zarr", codes, (2022, 2023), corner=(6.0, 46.0))
    settings = {
        "embeddings": _embeddings("mosaic.zarr", [2022, 2023], "mosaic"),
        "cube": {"shard": 128, "chunk": 64},
    }

    def check(cube: xr.DataTree) -> Iterator[truth.Finding]:
        for year, written in zip((2022, 2023), codes, strict=True):
            found = cube["epsg4326"].ds["embedding"].sel(time=f"{year}-01-01")
            expected = truth.put(truth.pixels(written, y, x), found)
            yield truth.equal(f"{year}", found.to_numpy(), expected.to_numpy())

    return Region(settings, check)


def stac(place: Place) -> Region:
    """Real items of 3DEP with files made here: heights of a third of a second, a prior of one."""
    items = {"height": "threedep/n41w106-13.json", "prior": "threedep/n41w106-1.json"}
    return _on_a_plane(place, items, "EPSG:32613", (-105.5, 40.5), "EPSG:5703")


def stac_thinned(place: Place) -> Region:
    """A real item of Copernicus GLO-30 at 53.5° N, where its pixels are wider than high."""
    name = "Copernicus_DSM_COG_10_N53_00_W115_00_DEM"
    items = {"height": f"cop-dem/{name}__{name}.json"}
    return _on_a_plane(place, items, "EPSG:32611", (-114.5, 53.5), "EPSG:3855")


def _on_a_plane(
    place: Place, items: dict[str, str], crs: str, middle: tuple[float, float], datum: str
) -> Region:
    """STAC items that hold a plane, and made-up embeddings of 2.56 km about a place in degrees."""

    def heights(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.float64]:
        # It rises by a tenth: half a pixel amiss would be half a metre.
        return 1500 + 8000 * (lon - middle[0]) + 8000 * (lat - middle[1])

    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(*middle)
    west, north = round(x, -1) - 1280, round(y, -1) + 1280
    write_tiles(place.folder / "aef", _made_up((256, 256), 3), (west, north), crs, 2024)
    ground = transform_bounds(crs, "EPSG:4326", west, north - 2560, west + 2560, north)
    settings = {"embeddings": _embeddings("aef", 2024), "cube": {"shard": 128, "chunk": 64}}
    for key, name in items.items():
        href = write_item(place.find(f"stac/{name}"), place.folder, ground, heights)
        about = {"surface": "dsm", "vertical_datum": datum}
        settings[key] = {"source": "stac", "href": href, **about}

    def check(cube: xr.DataTree) -> Iterator[truth.Finding]:
        (group,) = cube.children.values()
        expected = heights(*truth.centres(group.ds, crs, "EPSG:4326"))
        for key in items:
            yield truth.near(key, group.ds[key].to_numpy(), expected, truth.Allowed(0.02, 0.01))

    return Region(settings, check)


def s3(place: Place) -> Region:
    """A cube in an object store."""
    raise Skipped(
        "it needs an S3 server: set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and\n"
        "          AWS_SECRET_ACCESS_KEY, and run any case's region file into a bucket:\n"
        f"          aeheight ingest {place.folder.parent}/tile/region.yaml "
        "--set store=s3://BUCKET/tile"
    )


def _embeddings(href: object, year: int | list[int], source: str = "cog") -> dict[str, Any]:
    return {"source": source, "href": str(href), "year": year}


def _made_up(shape: tuple[int, int], seed: int) -> NDArray[np.int8]:
    """(64, rows, columns) codes that mean nothing."""
    codes = np.random.default_rng(seed).integers(-127, 128, (BANDS, *shape))
    return codes.astype(np.int8)


Case = Callable[[Place], Region]
CASES: dict[str, Case] = {
    case.__name__.replace("_", "-"): case
    for case in (tile, larger_grid, earthengine, earthengine_bands, two_zones, index, mosaic,
                 stac, stac_thinned, s3)
}  # fmt: skip


# --- the program ----------------------------------------------------------------------------------


def show(place: Place, options: Sequence[str] = ()) -> str:
    """Make a case's sources and region, ingest it, and say what came of it.

    Args:
        place: Of one case.
        options: More of the command's, such as `--workers 2`.

    Returns:
        `same`, `different`, `failed` (to ingest) or `skipped`.
    """
    case = CASES[place.name]
    print(f"\n{place.name.upper()}  {case.__doc__}", flush=True)
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir(parents=True)
    try:
        region = case(place)
    except Skipped as reason:
        print(f"skipped   {reason}")
        return "skipped"
    path, store = place.folder / "region.yaml", place.folder / "run"
    named = {"name": place.name, "store": str(store)}
    path.write_text(yaml.safe_dump(region.settings | named, sort_keys=False), encoding="utf-8")
    if _run("ingest", str(path), "--plan"):
        return "failed"
    region.arrive()
    if _run("ingest", str(path), *options):
        return "failed"
    return _judged(region, store / "cube.zarr")


def _run(*command: str) -> int:
    print("$ aeheight", *command, flush=True)
    if code := aeheight(command):
        print(f"failed    with exit code {code}")
    return code


def _judged(region: Region, path: Path) -> str:
    """Print what plain xarray sees in a cube, and whether it is the truth."""
    with xr.open_datatree(path, engine="zarr") as cube:
        for name, group in cube.children.items():
            rows, columns = group.sizes["y"], group.sizes["x"]
            print(f"group     {name}: {rows} x {columns} px, {group.ds.rio.crs} (by rioxarray)")
            for layer in ("embedding", "height", "prior"):
                if layer in group.data_vars:
                    print(f"          {_described(group.ds[layer])}")
        findings = list(region.check(cube))
    for finding in findings:
        print(f"{'same' if finding.holds else 'DIFFERENT':9s} {finding.text}")
    return "same" if all(finding.holds for finding in findings) else "different"


def _described(layer: xr.DataArray) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in layer.sizes.items())
    known = layer.notnull() if layer.dtype.kind == "f" else layer != layer.attrs["nodata"]
    text = f"{layer.name} ({sizes}) {layer.dtype}, {100 * float(known.mean()):.1f} % valid"
    if layer.dtype.kind == "f":
        text += f", {float(layer.min()):.1f} to {float(layer.max()):.1f} {layer.attrs['units']}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Show the cases named, or all; the exit code: 1 where one is not as it should be."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="pipelines.sources", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of the real data"
    )
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.names) - set(CASES)):
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    try:
        results = {
            name: show(Place(name, Path("runs"), arguments.data))
            for name in arguments.names or CASES
        }
    except InputError as error:
        print(f"sources: {error}", file=sys.stderr)
        return 2
    print()
    for name, result in results.items():
        print(f"{name:18s} {result}")
    return int(not {"same", "skipped"}.issuperset(results.values()))


if __name__ == "__main__":
    sys.exit(main())
