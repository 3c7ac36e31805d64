"""The Zarr tree: a template made once, read anywhere, written in whole shards only.

One group a grid, no arrays at the root. The cube of a run and its heights are both such trees.
Every chunk carries a CRC-32C, so that a damaged byte is an error at the next read, never a height.
"""

import hashlib
import json
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from pyproj import CRS
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ZarrUserWarning

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import CubeSettings, differences
from aeheight.store import Store, plain_errors
from aeheight.windows import Region, tile, whole

FORMAT = 1
_NO_YEAR = "static"
_CONVENTIONS = "https://raw.githubusercontent.com/zarr-conventions"
_GEOZARR = [
    {
        "schema_url": f"{_CONVENTIONS}/geo-proj/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/geo-proj/blob/v1/README.md",
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "name": "proj:",
        "description": "Coordinate reference system information for geospatial data",
    },
    {
        "schema_url": f"{_CONVENTIONS}/spatial/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "name": "spatial:",
        "description": "Spatial coordinate information",
    },
]


@dataclass(frozen=True, slots=True)
class Layer:
    """One array of every group."""

    name: str
    dtype: str
    """A numpy type, such as `int8`."""
    nodata: float
    """What a missing pixel holds: Zarr's fill value, and the declared attribute."""
    timed: bool = False
    """Whether there is one plane a year."""
    bands: tuple[str, ...] = ()
    """Names along the band axis; empty: there is none."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """CF attributes (`units`, `long_name`, ...)."""

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes."""
        return (*(["time"] if self.timed else []), *(["band"] if self.bands else []), "y", "x")


@dataclass(frozen=True, slots=True)
class Shard:
    """The name of one piece of work: one stored object of one layer."""

    group: str
    layer: str
    year: int | None
    """None for a layer without a time axis."""
    region: Region
    """The shard's pixels, clipped to the grid."""

    @property
    def name(self) -> str:
        """`utm10n/embedding/2021/r0000256-c0000000-256x256`."""
        return f"{self.group}/{self.layer}/{self.year or _NO_YEAR}/{self.region.name}"

    @classmethod
    def parse(cls, name: str) -> "Shard":
        """The shard of a `name`."""
        group, layer, year, region = name.split("/")
        return cls(group, layer, None if year == _NO_YEAR else int(year), Region.parse(region))


def _plain(nodata: float) -> float | int | str:
    """A nodata value as JSON can hold it."""
    if np.isnan(nodata):
        return "NaN"
    return int(nodata) if nodata == int(nodata) else nodata


def checksum(array: NDArray[Any]) -> str:
    """BLAKE2b-128 of an array's type, shape and values (hexadecimal); every NaN counts as one."""
    if array.dtype.kind == "f":
        # Zarr leaves out a chunk that is all NaN, and reads it back without sign and payload.
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Template:
    """All that is fixed before the first pixel is written."""

    grids: tuple[Grid, ...]
    """One a group."""
    layers: tuple[Layer, ...]
    years: tuple[int, ...]
    cut: CubeSettings
    title: str

    def layer(self, name: str) -> Layer:
        """The layer of a name."""
        return next(layer for layer in self.layers if layer.name == name)

    def grid(self, group: str) -> Grid:
        """The grid of a group."""
        return next(grid for grid in self.grids if grid.name == group)

    def shards(self, layer: str) -> list[Shard]:
        """Every shard of a layer, in order."""
        years: Sequence[int | None] = self.years if self.layer(layer).timed else [None]
        return [
            Shard(grid.name, layer, year, region)
            for grid in self.grids
            for year in years
            for region in tile(grid.shape, self.cut.shard)
        ]

    def describe(self) -> dict[str, Any]:
        """The template as JSON holds it."""
        plain = asdict(self) | {"cut": self.cut.model_dump()}
        described: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        described["grids"] = {
            grid.name: entry for grid, entry in zip(self.grids, described["grids"], strict=True)
        }
        described["layers"] = {entry.pop("name"): entry for entry in described["layers"]}
        for layer in self.layers:
            described["layers"][layer.name]["nodata"] = _plain(layer.nodata)
        return described


@dataclass(frozen=True, slots=True)
class Tree:
    """An open tree."""

    store: Store
    template: Template
    identity: str
    """A token drawn when the tree was created: two trees, two identities."""
    _root: "zarr.Group"

    def read(self, group: str, layer: str, year: int | None, region: Region) -> NDArray[Any]:
        """The pixels of a region that may reach past the grid: nodata there.

        Returns:
            (band, rows, columns), or (rows, columns) for a layer without bands.

        Raises:
            OSError: a chunk is damaged or cannot be read; names the region.
        """
        spec = self.template.layer(layer)
        shape = (len(spec.bands),) * bool(spec.bands) + region.shape
        out = np.full(shape, spec.nodata, dtype=spec.dtype)
        inside = region.intersect(whole(self.template.grid(group).shape))
        if inside is None:
            return out
        index = self._index(spec, year, inside)
        try:
            values = self._root[f"{group}/{layer}"][index]  # type: ignore[index]
        except Exception as error:
            raise OSError(
                f"{self.store.uri}: {group}/{layer} {inside.name} cannot be read "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                "run `aeheight verify` to find what is damaged"
            ) from error
        out[(..., *inside.within(region).slices)] = values
        return out

    def write(self, shard: Shard, values: NDArray[Any]) -> str:
        """Write one whole shard and return its checksum.

        Raises:
            ValueError: what is written is not exactly the shard that the template promises.
            OSError: the store cannot be written.
        """
        spec = self._check(shard)
        promised = (len(spec.bands),) * bool(spec.bands) + shard.region.shape
        if values.dtype != np.dtype(spec.dtype) or values.shape != promised:
            raise ValueError(
                f"{shard.name} is {spec.dtype} {promised}, got {values.dtype} {values.shape}"
            )
        array: Any = self._root[f"{shard.group}/{shard.layer}"]
        index = self._index(spec, shard.year, shard.region)
        doing = f"write {self.store.uri}/{shard.name}"
        try:
            with plain_errors(doing):
                array[index] = values
        except (OSError, InputError):
            raise
        except Exception:
            # Zarr reads a shard before it replaces it, and fails where the old one is damaged.
            self.store.remove(self._key(spec, shard))
            with plain_errors(doing):
                array[index] = values
        return checksum(values)

    def _check(self, shard: Shard) -> Layer:
        """The layer of a shard, if it is a whole one of this tree.

        Raises:
            ValueError: it is not.
        """
        spec, edge = self.template.layer(shard.layer), self.template.cut.shard
        shape, region = self.template.grid(shard.group).shape, shard.region
        cell = Region(region.row, region.col, edge, edge)
        if region.row % edge or region.col % edge or cell.intersect(whole(shape)) != region:
            raise ValueError(f"{shard.name} is no whole shard of {edge} px of {shape}")
        years = self.template.years if spec.timed else (None,)
        if shard.year not in years:
            raise ValueError(f"{shard.name}: {shard.layer} has no such year, only {years}")
        return spec

    def _key(self, spec: Layer, shard: Shard) -> str:
        """Where the shard's object lies in the store."""
        edge = self.template.cut.shard
        time = [self.template.years.index(shard.year)] if shard.year is not None else []
        band = [0] if spec.bands else []
        place = [*time, *band, shard.region.row // edge, shard.region.col // edge]
        return "/".join([shard.group, shard.layer, "c", *map(str, place)])

    def _index(self, spec: Layer, year: int | None, inside: Region) -> tuple[Any, ...]:
        time = (self.template.years.index(year),) if spec.timed and year is not None else ()
        return (*time, ..., *inside.slices)


def create(store: Store, template: Template) -> Tree:
    """Make a tree with its full metadata, or open the one that is there.

    Raises:
        InputError: the one that is there was made from another template; names what differs.
    """
    found = find(store)
    if found is None:
        with plain_errors(f"create {store.uri}"):
            _create(store, template)
        return open_tree(store, template)
    changed = differences(found["template"] | {"title": template.title}, template.describe())
    if changed:
        raise InputError(
            f"{store.uri} was made with other settings:\n  "
            + "\n  ".join(changed)
            + "\nrun with --overwrite to make it anew, or choose another store"
        )
    return open_tree(store, template)


def _create(store: Store, template: Template) -> None:
    root = zarr.create_group(
        store.zarr(),
        zarr_format=3,
        overwrite=True,
        attributes={
            "title": template.title,
            "aeheight": {
                "format": FORMAT,
                "identity": uuid.uuid4().hex[:16],
                "template": template.describe(),
            },
        },
    )
    for grid in template.grids:
        _create_group(root, grid, template)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
        zarr.consolidate_metadata(store.zarr())


def find(store: Store) -> dict[str, Any] | None:
    """What a tree says of itself (format, identity, template), or None where there is none.

    Raises:
        InputError: something else lies there, or a format that this version does not know.
    """
    foreign = InputError(
        f"{store.uri} holds something that aeheight did not make (or that is half removed); "
        "choose another store, or discard what is there with --overwrite"
    )
    try:
        metadata = json.loads(store.read("zarr.json"))
        found = metadata.get("attributes", {}).get("aeheight")
    except FileNotFoundError:
        # A tree begins with its zarr.json, and making one clears the folder first.
        if next(store.keys(), None) is not None:
            raise foreign from None
        return None
    except (ValueError, AttributeError):
        raise foreign from None
    if found is None:
        raise foreign
    if found["format"] != FORMAT:
        raise InputError(
            f"{store.uri} has format {found['format']}, this version reads {FORMAT}; "
            "make it anew with --overwrite, or use the version that made it"
        )
    # Consolidated metadata is written last: without it the template is half-written.
    return dict(found) if metadata.get("consolidated_metadata") else None


def open_tree(store: Store, template: Template | None = None) -> Tree:
    """Open a tree that exists.

    Raises:
        InputError: there is none.
    """
    found = find(store)
    if found is None:
        raise InputError(f"there is no cube at {store.uri}; run the step that makes it first")
    return Tree(
        store,
        template or _template(found["template"]),
        found["identity"],
        _open_root(store.uri, found["identity"]),
    )


@lru_cache(maxsize=16)
def _open_root(uri: str, identity: str) -> "zarr.Group":
    return zarr.open_group(Store(uri).zarr(), mode="r+", use_consolidated=True)


def _template(found: Mapping[str, Any]) -> Template:
    grids = tuple(
        Grid(**(entry | {"shape": tuple(entry["shape"])})) for entry in found["grids"].values()
    )
    layers = tuple(
        Layer(
            name=name,
            **(entry | {"bands": tuple(entry["bands"]), "nodata": float(entry["nodata"])}),
        )
        for name, entry in found["layers"].items()
    )
    return Template(
        grids, layers, tuple(found["years"]), CubeSettings(**found["cut"]), found["title"]
    )


def open_cube(uri: str) -> xr.DataTree:
    """A tree as lazy xarray objects: one group a grid, coordinates at pixel centres, a CRS.

    Raises:
        InputError: there is none.
    """
    open_tree(Store.at(uri))
    store: Any = Store.at(uri).zarr(read_only=True)
    return xr.open_datatree(store, engine="zarr", chunks={})


def _create_group(root: "zarr.Group", grid: Grid, template: Template) -> None:
    crs = CRS.from_user_input(grid.crs)
    transform = list(grid.transform)[:6]
    group = root.create_group(
        grid.name,
        attributes={
            "Conventions": "CF-1.11",
            "zarr_conventions": _GEOZARR,
            **(
                {"proj:code": grid.crs}
                if ":" in grid.crs and len(grid.crs) < 32
                else {"proj:wkt2": crs.to_wkt()}
            ),
            "spatial:dimensions": ["y", "x"],
            "spatial:transform": transform,
            "spatial:transform_type": "affine",
            "spatial:bbox": list(grid.bounds),
            "spatial:shape": list(grid.shape),
            "spatial:registration": "pixel",
        },
    )
    for name, values, attributes in _coordinates(grid, template, crs):
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape or "auto",
            dimension_names=[name] * values.ndim,
            attributes=attributes,
        )
        array[...] = values
    for layer in template.layers:
        _create_layer(group, layer, grid, template)


def _coordinates(
    grid: Grid, template: Template, crs: CRS
) -> list[tuple[str, NDArray[Any], dict[str, Any]]]:
    unit, prefix = ("degrees", "") if grid.is_geographic else ("m", "projection_")
    names = (
        ("latitude", "longitude")
        if grid.is_geographic
        else ("projection_y_coordinate", "projection_x_coordinate")
    )
    units = ("degrees_north", "degrees_east") if not prefix else (unit, unit)
    transform = " ".join(repr(float(value)) for value in grid.transform.to_gdal())
    mapping = crs.to_cf() | {"spatial_ref": crs.to_wkt(), "GeoTransform": transform}
    days = np.array([np.datetime64(f"{year}-01-01", "D") for year in template.years])
    coordinates: list[tuple[str, NDArray[Any], dict[str, Any]]] = [
        ("y", grid.y(), {"standard_name": names[0], "units": units[0], "axis": "Y"}),
        ("x", grid.x(), {"standard_name": names[1], "units": units[1], "axis": "X"}),
        ("spatial_ref", np.array(0, dtype=np.int64), mapping),
    ]
    if any(layer.timed for layer in template.layers):
        coordinates.append(
            (
                "time",
                days.astype(np.int64),
                {
                    "standard_name": "time",
                    "axis": "T",
                    "units": "days since 1970-01-01",
                    "calendar": "proleptic_gregorian",
                },
            )
        )
    bands = next((layer.bands for layer in template.layers if layer.bands), ())
    if bands:
        coordinates.append(
            (
                "band",
                np.arange(len(bands), dtype=np.int16),
                {"long_name": "embedding band", "band_names": list(bands)},
            )
        )
    return coordinates


def _create_layer(group: "zarr.Group", layer: Layer, grid: Grid, template: Template) -> None:
    sizes = {
        "time": len(template.years),
        "band": len(layer.bands),
        "y": grid.shape[0],
        "x": grid.shape[1],
    }
    cut = template.cut
    chunk = sizes | {"time": 1, "y": cut.chunk, "x": cut.chunk}
    shard = chunk | {"y": cut.shard, "x": cut.shard}
    compressor = BloscCodec(
        cname="zstd", clevel=3, shuffle="bitshuffle", typesize=np.dtype(layer.dtype).itemsize
    )
    group.create_array(
        layer.name,
        shape=tuple(sizes[dim] for dim in layer.dims),
        chunks=tuple(chunk[dim] for dim in layer.dims),
        shards=tuple(shard[dim] for dim in layer.dims),
        dtype=layer.dtype,
        fill_value=np.dtype(layer.dtype).type(layer.nodata),
        compressors=[compressor, Crc32cCodec()],
        dimension_names=layer.dims,
        attributes={
            **layer.attributes,
            "nodata": _plain(layer.nodata),
            "grid_mapping": "spatial_ref",
            # Makes xarray carry the CRS along with every single variable.
            "coordinates": "spatial_ref",
        },
    )
