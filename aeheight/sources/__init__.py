"""Where pixels come from: AlphaEarth tiles, rasters and STAC items, onto any region of a grid.

Plan, then read: `scan` opens headers only and returns `Sources`, a plain value that is stored
beside the receipts and sent to nobody; a task loads it once, as a `Reader`, and reads the pixels of
its own shard from the files that touch it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from aeheight.embeddings import BANDS, parse_tile_name
from aeheight.errors import InputError
from aeheight.grid import Grid, reproject_bounds, transformer
from aeheight.settings import RegionSettings, fingerprint
from aeheight.sources.areas import read_aoi
from aeheight.sources.classes import ClassSource, read_classes, scan_classes
from aeheight.sources.datum import DatumShift, plan_shift
from aeheight.sources.exports import scan_exports
from aeheight.sources.heights import HeightSource, Raster, place, read_heights, scan_heights
from aeheight.sources.index import scan_index
from aeheight.sources.mosaic import scan_mosaic
from aeheight.sources.tile import EmbeddingSource, EmbeddingTile
from aeheight.sources.tiles import read_embeddings, scan_tiles
from aeheight.sources.zones import Plot, lay_out, search_boxes
from aeheight.template import Shard
from aeheight.windows import Region, Runs, whole

__all__ = [
    "ClassMaps",
    "ClassSource",
    "EmbeddingSource",
    "EmbeddingTile",
    "Ground",
    "HeightSource",
    "Reader",
    "Sources",
    "read_embeddings",
    "read_heights",
    "scan",
]


_ANY: TypeAdapter[Any] = TypeAdapter(Any)


@dataclass(frozen=True, slots=True)
class Ground:
    """One group of the cube: its grid, and every file that touches it."""

    grid: Grid
    runs: Runs | None
    """The shards to make; None: all."""
    embeddings: EmbeddingSource
    height: HeightSource | None
    prior: HeightSource | None


@dataclass(frozen=True, slots=True)
class Sources:
    """Every file of a run, with what its header says."""

    grounds: tuple[Ground, ...]
    """One a group."""

    @property
    def files(self) -> dict[str, list[str]]:
        """Hrefs of all `embeddings`, `height` and `prior`, each once, in order."""
        found: dict[str, dict[str, None]] = {"embeddings": {}, "height": {}, "prior": {}}
        for ground in self.grounds:
            for tile in ground.embeddings.tiles:
                found["embeddings"] |= dict.fromkeys(file.href for file in tile.files)
            for key, source in (("height", ground.height), ("prior", ground.prior)):
                found[key] |= dict.fromkeys(r.href for r in (source.rasters if source else ()))
        return {key: list(hrefs) for key, hrefs in found.items()}

    def lacks(self, known: "Sources") -> list[str]:
        """Files that others had and these have not, wherever they lie.

        A file is known by its use, its year and its name; of equal names there must be as many.
        """
        have, lost = Counter(name for name, _ in self._named()), []
        for name, href in known._named():
            have[name] -= 1
            if have[name] < 0:
                lost.append(href)
        return lost

    def _named(self) -> Iterator[tuple[str, str]]:
        for key, hrefs in self.files.items():
            for href in hrefs:
                yield f"{key} {parse_tile_name(href).year} {href.rpartition('/')[2]}", href

    def to_bytes(self) -> bytes:
        """JSON."""
        return TypeAdapter(Sources).dump_json(self, indent=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Sources":
        """The sources of `to_bytes`."""
        return TypeAdapter(cls).validate_json(data)


_SCANS: Mapping[str, Callable[[RegionSettings], list[EmbeddingTile]]] = {
    "cog": scan_tiles,
    "mosaic": scan_mosaic,
    "earthengine": scan_exports,
}


def scan(settings: RegionSettings) -> Sources:
    """The grids of a region and the files that touch them, from headers alone.

    Raises:
        InputError: a file is missing or is not what the settings say; files that do not fit the
            grid or each other; nothing that touches the grid.
    """
    shapes = read_aoi(settings)
    if settings.embeddings.source == "index":
        tiles = scan_index(settings, search_boxes(settings, shapes))
    else:
        tiles = _SCANS[settings.embeddings.source](settings)
    plots = lay_out(settings, tiles, shapes)
    _refuse_missing_years(settings, plots)
    grids = [plot.grid for plot in plots]
    models = {
        key: scan_heights(settings, wanted, grids, key) if wanted else None
        for key, wanted in (("height", settings.height), ("prior", settings.prior))
    }
    _share_ground(settings, plots, models["height"])
    grounds = tuple(_ground(settings, plot, models) for plot in plots)
    return Sources(grounds)


def _refuse_missing_years(settings: RegionSettings, plots: Sequence[Plot]) -> None:
    have = {tile.year for plot in plots for tile in plot.tiles}
    if missing := sorted(set(settings.embeddings.years) - have):
        raise InputError(
            f"embeddings.year: no tile of {missing} touches the region; there are {sorted(have)}"
        )


def _ground(
    settings: RegionSettings, plot: Plot, models: Mapping[str, HeightSource | None]
) -> Ground:
    height, prior = (_narrowed(models[key], plot.grid) for key in ("height", "prior"))
    if height and prior and settings.height and settings.prior and settings.prior.convert:
        area = reproject_bounds(plot.grid.bounds, plot.grid.crs, "EPSG:4326")
        shift = plan_shift(settings.prior.vertical_datum, settings.height.vertical_datum, area)
        prior = replace(prior, shift=shift)
    embeddings = EmbeddingSource(plot.tiles, settings.embeddings.access)
    return Ground(plot.grid, plot.runs, embeddings, height, prior)


def _narrowed(source: HeightSource | None, grid: Grid) -> HeightSource | None:
    """Only the rasters that touch a grid."""
    if source is None:
        return None
    kept = [
        raster
        for raster in source.rasters
        if (there := place(raster, grid)) and there.intersect(whole(grid.shape))
    ]
    return replace(source, rasters=tuple(kept))


def _share_ground(
    settings: RegionSettings, plots: Sequence[Plot], height: HeightSource | None
) -> None:
    """Refuse heights that lie nowhere where tiles do."""
    if height is None:
        return
    for plot in plots:
        tiles = _places([tile.reaches(plot.grid) for tile in plot.tiles])
        for raster in height.rasters:
            there = place(raster, plot.grid)
            if there and _meeting(tiles, there).any():
                return
    plot = plots[0]
    tile, raster = plot.tiles[0], height.rasters[0]
    raise InputError(
        f"tiles and height both touch the grid {list(plot.grid.bounds)}, but nowhere the same "
        f"ground: {tile.href} covers {list(tile.grid.bounds)} ({tile.grid.crs}), {raster.href} "
        f"{list(raster.bounds)} ({raster.crs})"
    )


def _places(regions: Sequence[Region | None]) -> NDArray[np.int64]:
    """(n, 4) first row, first column, row and column after the last; empty where there is none."""
    rows = [(r.row, r.col, r.bottom, r.right) if r else (0, 0, 0, 0) for r in regions]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _meeting(places: NDArray[np.int64], region: Region) -> NDArray[np.bool_]:
    """(n,) which places share a pixel with a region."""
    top, left, bottom, right = places.T
    meets: NDArray[np.bool_] = (
        (top < region.bottom) & (region.row < bottom) & (left < region.right) & (region.col < right)
    )
    return meets


class _Finder:
    """The files of one layer of a group, found by where they lie."""

    def __init__(
        self,
        files: Sequence[Any],
        places: Sequence[Region | None],
        shift: DatumShift | None = None,
    ) -> None:
        self._files = files
        self._places = _places(places)
        self._digests: list[str] = []
        self._shift = [] if shift is None else [fingerprint(_ANY.dump_python(shift, mode="json"))]

    def touching(self, shard: Shard) -> list[int]:
        """Numbers of the files that a shard is made from, in order of precedence."""
        found = np.flatnonzero(_meeting(self._places, shard.region))
        return [i for i in map(int, found) if self._of_year(self._files[i], shard.year)]

    @staticmethod
    def _of_year(file: EmbeddingTile | Raster, year: int | None) -> bool:
        return year is None or not isinstance(file, EmbeddingTile) or file.year == year

    def chosen(self, shard: Shard) -> tuple[Any, ...]:
        """Those files."""
        return tuple(self._files[number] for number in self.touching(shard))

    def digests(self, shard: Shard) -> list[str]:
        """Their fingerprints, and that of what is done to their heights."""
        self._digests = self._digests or [_digest(file) for file in self._files]
        return [self._digests[i] for i in self.touching(shard)] + self._shift


def _digest(file: EmbeddingTile | Raster) -> str:
    """Fingerprint of a file's header.

    A local file is known by its name, size and time of change, not by its folder: data may move,
    and what was made from it stays. A remote one is known by its URI.
    """
    record = _ANY.dump_json(file)
    files = file.files if isinstance(file, EmbeddingTile) else (file,)
    for path in (Path(each.href) for each in files):
        if path.is_file():
            state = path.stat()
            known = f"{path.name} of {state.st_size} bytes, {state.st_mtime_ns}"
            record = record.replace(_ANY.dump_json(str(path)), _ANY.dump_json(known))
    return fingerprint(record.decode())


class Reader:
    """What tasks and plans ask of sources: what a shard is made from, and its pixels."""

    def __init__(self, sources: Sources) -> None:
        self._grounds = {ground.grid.name: ground for ground in sources.grounds}
        self._finders: dict[tuple[str, str], _Finder] = {}

    def inputs(self, shard: Shard) -> str:
        """Fingerprint of all that a shard is made from: the headers of the files that touch it."""
        return fingerprint(self._finder(shard).digests(shard))

    def read(self, shard: Shard) -> NDArray[Any]:
        """The pixels of a shard: int8 codes (64, rows, columns) or metres (rows, columns).

        Raises:
            OSError: a file breaks off.
            InputError: a file is not what its header says.
        """
        ground, files = self._grounds[shard.group], self._finder(shard).chosen(shard)
        if shard.layer == "embedding":
            assert shard.year is not None
            source = replace(ground.embeddings, tiles=files)
            return read_embeddings(source, ground.grid, shard.region, shard.year)
        heights = {"height": ground.height, "prior": ground.prior}[shard.layer]
        assert heights is not None
        return read_heights(replace(heights, rasters=files), ground.grid, shard.region)

    def bytes_to_read(self, shard: Shard) -> int:
        """Raw bytes of the source pixels under a shard, as far as headers tell."""
        ground, total = self._grounds[shard.group], 0
        for file in self._finder(shard).chosen(shard):
            there = (
                file.reaches(ground.grid)
                if isinstance(file, EmbeddingTile)
                else place(file, ground.grid)
            )
            shared = there and there.intersect(shard.region)
            if shared:
                total += round(shared.size * _bytes_per_pixel(file, ground.grid))
        return total

    def _finder(self, shard: Shard) -> _Finder:
        key = (shard.group, shard.layer)
        if key not in self._finders:
            self._finders[key] = self._find(self._grounds[shard.group], shard.layer)
        return self._finders[key]

    def _find(self, ground: Ground, layer: str) -> _Finder:
        if layer == "embedding":
            tiles = ground.embeddings.tiles
            return _Finder(tiles, [tile.reaches(ground.grid) for tile in tiles])
        source = {"height": ground.height, "prior": ground.prior}[layer]
        rasters = source.rasters if source else ()
        shift = source.shift if source else None
        return _Finder(rasters, [place(raster, ground.grid) for raster in rasters], shift)


class ClassMaps:
    """What evaluation asks of class rasters: what a shard sees of them, and their pixels."""

    def __init__(self, sources: Mapping[str, ClassSource]) -> None:
        self._sources = sources
        self._finders: dict[tuple[str, Grid], _Finder] = {}

    @classmethod
    def scan(cls, settings: RegionSettings, grids: Sequence[Grid]) -> "ClassMaps":
        """The class rasters of a region file, from headers alone; errors as `scan_classes`."""
        wanted = settings.evaluate.classes
        return cls({name: scan_classes(settings, name, wanted[name], grids) for name in wanted})

    def to_bytes(self) -> bytes:
        """JSON."""
        return _CLASSES.dump_json(dict(self._sources), indent=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ClassMaps":
        """The maps of `to_bytes`."""
        return cls(_CLASSES.validate_json(data))

    @property
    def files(self) -> dict[str, list[str]]:
        """Hrefs by name."""
        return {name: [r.href for r in source.rasters] for name, source in self._sources.items()}

    def inputs(self, grid: Grid, shard: Shard) -> list[str]:
        """Fingerprints of the headers of all files that touch a shard of a grid."""
        return [digest for name in self._sources for digest in self._of(name, grid).digests(shard)]

    def read(self, grid: Grid, region: Region) -> dict[str, NDArray[np.int64]]:
        """Classes (rows, columns) of a region by name, -1 where there is none.

        Raises:
            OSError: a file breaks off.
            InputError: a file is not what its header said.
        """
        return {name: read_classes(source, grid, region) for name, source in self._sources.items()}

    def _of(self, name: str, grid: Grid) -> _Finder:
        if (name, grid) not in self._finders:
            rasters = self._sources[name].rasters
            places = [place(raster, grid) for raster in rasters]
            self._finders[name, grid] = _Finder(rasters, places)
        return self._finders[name, grid]


_CLASSES: TypeAdapter[dict[str, ClassSource]] = TypeAdapter(dict[str, ClassSource])


def _bytes_per_pixel(file: EmbeddingTile | Raster, grid: Grid) -> float:
    """Source bytes under one pixel of the grid; of float32 heights, at the raster's middle."""
    if isinstance(file, EmbeddingTile):
        return float(BANDS)
    west, south, east, north = file.bounds
    (dx, dy), x, y = file.resolution, (west + east) / 2, (south + north) / 2
    xs, ys = transformer(file.crs, grid.crs).transform([x, x + dx, x], [y, y, y + dy])
    right, up = (xs[1] - xs[0], ys[1] - ys[0]), (xs[2] - xs[0], ys[2] - ys[0])
    area = abs(right[0] * up[1] - right[1] * up[0])
    return 4 * grid.resolution**2 / area if 0 < area < np.inf else 4.0
