"""The Zarr tree: a template made once, read anywhere, written in whole shards only.

One group a grid, no arrays at the root. The cube of a run and its heights are both such trees.
Every chunk carries a CRC-32C, so that a damaged byte is an error at the next read, never a height.
"""

import hashlib
import json
import uuid
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from aeheight import embeddings
from aeheight.arrays import consolidate, create_coordinates, create_layer, layer_attributes
from aeheight.conventions import coordinates, group_attributes, time_coordinate
from aeheight.errors import InputError, NotYetError
from aeheight.grid import Grid
from aeheight.settings import differences, fingerprint
from aeheight.shards import Place, decode, encode_shard, index_size, places
from aeheight.store import Store, plain_errors
from aeheight.template import Layer, Shard, Template
from aeheight.windows import Region, whole

FORMAT = 2
_NOTE = "note.json"
_AHEAD = 1
"""Shards that a read fetches while it decodes one."""
_FETCHERS = 4
"""Shards that a process fetches at the same time, for all its tasks."""


def digest(data: bytes) -> str:
    """BLAKE2b-128 of bytes (hexadecimal)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def checksum(array: NDArray[Any]) -> str:
    """BLAKE2b-128 over type, shape and the CRC-32 of every plane; every NaN counts as one.

    A tenth of the time of BLAKE2b over all bytes: a plane with a burst of up to 32 wrong bits is
    found for certain, any other but for one in 2^32. (Each stored chunk has its CRC-32C besides.)
    """
    if array.dtype.kind == "f":
        # Zarr leaves out a chunk that is all NaN, and reads it back without sign and payload.
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    found = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    for plane in array.reshape(-1, *array.shape[-2:]):
        found.update(zlib.crc32(np.ascontiguousarray(plane).data).to_bytes(4, "little"))
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Tree:
    """An open tree."""

    store: Store
    template: Template
    identity: str
    """A token drawn when the tree was created: two trees, two identities."""

    @property
    def version(self) -> str:
        """Fingerprint of the template: a tree that was given more years has another."""
        return fingerprint(self.template.describe())

    def read(self, group: str, layer: str, year: int | None, region: Region) -> NDArray[Any]:
        """The pixels of a region that may reach past the grid: nodata there.

        Returns:
            (band, rows, columns), or (rows, columns) for a layer without bands.

        Raises:
            OSError: a chunk is damaged or cannot be read; names the region.
        """
        spec = self.template.layer(layer)
        out = np.empty((len(spec.bands),) * bool(spec.bands) + region.shape, dtype=spec.dtype)
        inside = region.intersect(whole(self.template.grid(group).shape))
        if inside != region:
            out.fill(spec.nodata)
        if inside is None:
            return out
        try:
            with plain_errors(f"read {self.store.uri}/{group}/{layer}"):
                self._fill(out[(..., *inside.within(region).slices)], group, spec, year, inside)
        except InputError:  # no right to, which no checksum explains
            raise
        except Exception as error:
            raise OSError(
                f"{self.store.uri}: {group}/{layer} {inside.name} cannot be read "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                "run `aeheight verify` to find what is damaged"
            ) from error
        return out

    def _fill(
        self, out: NDArray[Any], group: str, spec: Layer, year: int | None, inside: Region
    ) -> None:
        """Read the pixels of a region; one shard is decoded while the next are fetched."""
        edge = self.template.cut.shard
        cells = [
            Region(row, col, edge, edge)
            for row in range(inside.row // edge * edge, inside.bottom, edge)
            for col in range(inside.col // edge * edge, inside.right, edge)
        ]
        waiting: deque[Future[list[tuple[Place, Any]]]] = deque()
        for cell in cells:
            shard = Shard(group, spec.name, year if spec.timed else None, cell)
            waiting.append(_fetchers().submit(self._fetch, shard, inside))
            if len(waiting) > _AHEAD:
                decode(waiting.popleft().result(), inside, out, spec.nodata)
        while waiting:
            decode(waiting.popleft().result(), inside, out, spec.nodata)

    def _fetch(self, shard: Shard, inside: Region) -> list[tuple[Place, Any]]:
        """The chunks of a shard that touch a region, compressed."""
        key, cut, cell = self.key(shard), self.template.cut, shard.region
        try:
            index = self.store.end(key, index_size(cut.shard, cut.chunk))
        except FileNotFoundError:  # all nodata
            return [(Place(cell, 0, 0), b"")]
        found = places(index, cell, cut.chunk, inside)
        stored = [place for place in found if place.size]
        parts = self.store.parts(key, [p.start for p in stored], [p.size for p in stored])
        absent = [(place, b"") for place in found if not place.size]
        return [*zip(stored, parts, strict=True), *absent]

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
        self._refuse_stale()
        cut, key = self.template.cut, self.key(shard)
        data = encode_shard(values, cut.shard, cut.chunk, spec.nodata)
        if data is not None:
            self.store.write(key, data)
        else:
            self.store.remove_many([key])  # Zarr keeps no shard that is all nodata
        return checksum(values)

    def _refuse_stale(self) -> None:
        """A straggler must not write where another year lies by now.

        Raises:
            OSError: the tree was given more years, or made anew, since it was opened.
        """
        found = find(self.store)
        if (
            found is None
            or found["identity"] != self.identity
            or (fingerprint(found["template"]) != self.version)
        ):
            raise OSError(f"{self.store.uri} has changed since it was opened; run again")

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

    def key(self, shard: Shard) -> str:
        """Where the shard's object lies in the store."""
        spec = self.template.layer(shard.layer)
        edge = self.template.cut.shard
        time = [self.template.years.index(shard.year)] if shard.year is not None else []
        band = [0] if spec.bands else []
        place = [*time, *band, shard.region.row // edge, shard.region.col // edge]
        return "/".join([shard.group, shard.layer, "c", *map(str, place)])


@cache
def _fetchers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch")


def create(store: Store, template: Template) -> Tree:
    """Make a tree with its full metadata, or open the one that is there.

    One that is there may be given more years, ground and layers; what it holds stays as it is.

    Raises:
        InputError: the one that is there was made from another template; names what differs.
    """
    finish_growing(store)
    found = find(store)
    if found is None:
        with plain_errors(f"create {store.uri}"):
            _create(store, template)
        return open_tree(store)
    old = replace(Template.described(found["template"]), title=template.title)
    check_growth(store, old, template)
    if old.describe() != template.describe():
        with plain_errors(f"extend {store.uri}"):
            _grow(store, old, template)
    return open_tree(store)


def check_growth(store: Store, old: Template, new: Template) -> None:
    """Refuse a template that is not the old one with more years, ground or layers.

    Raises:
        InputError: names what differs.
    """
    old = replace(old, title=new.title)
    if not new.extends(old):
        raise InputError(
            f"{store.uri} was made with other settings:\n  "
            + "\n  ".join(differences(old.describe(), new.describe()))
            + "\nyears, ground, `height` and `prior` can be added, nothing be taken away: set them "
            "back, run with --overwrite to make it anew, or choose another store"
        )


def _create(store: Store, template: Template) -> None:
    root = zarr.create_group(
        store.zarr(),
        zarr_format=3,
        overwrite=True,
        attributes=_root_attributes(template, uuid.uuid4().hex[:16]),
    )
    for grid in template.grids:
        group = root.create_group(grid.name, attributes=group_attributes(grid))
        bands = next((layer.bands for layer in template.layers if layer.bands), ())
        timed = any(layer.timed for layer in template.layers)
        create_coordinates(group, coordinates(grid, template.years if timed else (), bands))
        for layer in template.layers:
            _create_layer(group, layer, grid, template)
    consolidate(store.zarr())


def _root_attributes(template: Template, identity: str) -> dict[str, Any]:
    described = {"format": FORMAT, "identity": identity, "template": template.describe()}
    return {"title": template.title, "aeheight": described}


def _grow(store: Store, old: Template, new: Template) -> None:
    """Give a tree more years, ground or layers.

    A year before others moves theirs along the time axis: their objects are copied, the last
    first, so that no copy is lost wherever this stops. A note in the store says how far it came;
    until it is gone nobody can open the tree.
    """
    note = {"old": old.describe(), "new": new.describe(), "moved": 0}
    _growing(store).write(_NOTE, json.dumps(note).encode())
    finish_growing(store)


def remove_tree(store: Store) -> None:
    """Remove a tree, also one that is half grown."""
    _growing(store).remove()
    store.remove()


def _growing(store: Store) -> Store:
    """Beside a tree that is given more years: what it is to become, and how far it is."""
    return Store(f"{store.uri}.growing", store.access)


def finish_growing(store: Store) -> None:
    """Take up the growth that a note in the store tells of, if there is one."""
    try:
        note = _growing(store).read_json(_NOTE)
    except FileNotFoundError:
        return
    old, new = Template.described(note["old"]), Template.described(note["new"])
    moves = [(old.years.index(y), new.years.index(y)) for y in reversed(old.years)]
    moves = [(before, after) for before, after in moves if before != after]
    for number, (before, after) in enumerate(moves):
        if number >= note["moved"]:
            _copy_year(store, new, before, after)
            _growing(store).write(_NOTE, json.dumps(note | {"moved": number + 1}).encode())
    for year in set(new.years) - set(old.years):
        for prefix in _year_prefixes(new, new.years.index(year)):
            store.remove(prefix)
    _rewrite_metadata(store, new)
    _growing(store).remove()


def _year_prefixes(template: Template, index: int) -> list[str]:
    """Where the objects of one year lie."""
    timed = [layer.name for layer in template.layers if layer.timed]
    return [f"{grid.name}/{name}/c/{index}/" for grid in template.grids for name in timed]


def _copy_year(store: Store, template: Template, before: int, after: int) -> None:
    pairs = zip(_year_prefixes(template, before), _year_prefixes(template, after), strict=True)
    for source, target in pairs:
        store.remove(target)
        for key in list(store.keys(source)):
            store.copy(key, target + key.removeprefix(source))


def _rewrite_metadata(store: Store, template: Template) -> None:
    root = zarr.open_group(store.zarr(), mode="r+", use_consolidated=False)
    for grid in template.grids:
        group: Any = root[grid.name]
        for layer in template.layers:
            if layer.name not in group:
                _create_layer(group, layer, grid, template)
                continue
            group[layer.name].attrs.put(layer_attributes(layer))
            if layer.timed:
                group[layer.name].resize((len(template.years), *group[layer.name].shape[1:]))
        if any(layer.timed for layer in template.layers):
            create_coordinates(group, [time_coordinate(template.years)], overwrite=True)
    identity: Any = root.attrs["aeheight"]
    root.update_attributes(_root_attributes(template, identity["identity"]))
    consolidate(store.zarr())


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
        data = store.read("zarr.json")
    except FileNotFoundError:
        # A tree begins with its zarr.json, and making one clears the folder first.
        if next(store.keys(), None) is not None:
            raise foreign from None
        return None
    try:
        metadata = json.loads(data)
        found = metadata.get("attributes", {}).get("aeheight")
    except (ValueError, AttributeError):
        raise foreign from None
    if found is None:
        raise foreign
    if _growing(store).exists(_NOTE):
        raise NotYetError(
            f"{store.uri} was interrupted while it was given more years; run the step that makes "
            "it once more"
        )
    if found["format"] != FORMAT:
        raise InputError(
            f"{store.uri} has format {found['format']}, this version reads {FORMAT}; "
            "make it anew with --overwrite, or use the version that made it"
        )
    # Consolidated metadata is written last: without it the template is half-written.
    return dict(found) if metadata.get("consolidated_metadata") else None


def open_tree(store: Store) -> Tree:
    """Open a tree that exists.

    Raises:
        InputError: there is none.
    """
    found = find(store)
    if found is None:
        raise InputError(f"there is no cube at {store.uri}; run the step that makes it first")
    return Tree(store, Template.described(found["template"]), found["identity"])


def open_cube(uri: str, *, decode: bool = False) -> xr.DataTree:
    """A tree as lazy xarray objects: one group a grid, coordinates at pixel centres, a CRS.

    Args:
        uri: a run's `cube.zarr`, `heights.zarr` or `calibrated.zarr`.
        decode: give `embedding` as float32 values in -1..1 (NaN: none) instead of int8 codes; also
            lazily, when a part is computed.

    Raises:
        InputError: there is none.
    """
    place = Store.at(uri)
    trees = ("cube.zarr", "heights.zarr", "calibrated.zarr")
    inside = [name for name in trees if place.exists(f"{name}/zarr.json")]
    if inside:
        raise InputError(f"{uri} is a run's store: name {uri}/{' or /'.join(inside)}")
    open_tree(place)
    store: Any = place.zarr(read_only=True)
    tree = xr.open_datatree(store, engine="zarr", chunks={})
    return tree.map_over_datasets(_decoded if decode else xr.Dataset.drop_encoding)


def _decoded(group: xr.Dataset) -> xr.Dataset:
    # How it is stored says nothing of what becomes of it: it would write floats as int8.
    group = group.drop_encoding()
    if "embedding" not in group:
        return group
    codes = group["embedding"]
    values = codes.copy(data=codes.data.map_blocks(embeddings.decode, dtype=np.float32))
    values.attrs |= {"nodata": "NaN", "comment": "decoded from int8 codes; NaN is nodata"}
    return group.assign(embedding=values)


def _create_layer(group: "zarr.Group", layer: Layer, grid: Grid, template: Template) -> None:
    rows, cols = grid.shape
    sizes = {"time": len(template.years), "band": len(layer.bands), "y": rows, "x": cols}
    create_layer(group, layer, sizes, template.cut.shard, template.cut.chunk)
