"""A small tree for tests: two grids, three layers, clipped shards; and a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from aeheight.cube import Tree, create
from aeheight.grid import Grid
from aeheight.settings import CubeSettings
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template

UTM = Grid("EPSG:32610", 10.0, 403200.0, 4279500.0, (50, 70))
DEGREES = Grid("EPSG:4326", 0.001, -122.0, 38.0, (20, 33))
LAYERS = (
    Layer(
        "embedding",
        "int8",
        -128,
        timed=True,
        bands=("A00", "A01", "A02"),
        attributes={"long_name": "codes", "units": "1"},
    ),
    Layer("height", "float32", np.nan, attributes={"units": "m"}),
    Layer("split", "uint8", 0),
)
TEMPLATE = Template((UTM, DEGREES), LAYERS, (2020, 2022), CubeSettings(shard=32, chunk=16), "test")
RNG = np.random.default_rng(7)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes: to a writer that is a full disk, and needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def values_for(shard: Shard) -> np.ndarray:
    """Random values of a shard, some of them missing."""
    layer = TEMPLATE.layer(shard.layer)
    shape = (len(layer.bands),) * bool(layer.bands) + shard.region.shape
    if layer.dtype == "float32":
        values = RNG.normal(100, 40, shape).astype(np.float32)
        values[RNG.random(shape) < 0.1] = np.nan
        return values
    low, high = (-127, 128) if layer.dtype == "int8" else (0, 4)
    return RNG.integers(low, high, shape).astype(layer.dtype)


def mosaic(
    written: dict[str, np.ndarray], group: str, layer: str, year: int | None = None
) -> np.ndarray:
    """What the whole layer should be, put together from what was written."""
    spec = TEMPLATE.layer(layer)
    shape = (len(spec.bands),) * bool(spec.bands) + TEMPLATE.grid(group).shape
    out = np.full(shape, spec.nodata, spec.dtype)
    for shard in TEMPLATE.shards(layer):
        if (shard.group, shard.year) == (group, year) and shard.name in written:
            out[(..., *shard.region.slices)] = written[shard.name]
    return out


def bytes_of(tree: Tree) -> dict[str, bytes]:
    """Every object of a tree."""
    return {key: tree.store.read(key) for key in tree.store.keys()}  # noqa: SIM118


def full_tree(store: Store) -> tuple[Tree, dict[str, np.ndarray]]:
    """A tree with every shard written, and what was written."""
    tree = create(store, TEMPLATE)
    written = {}
    for layer in LAYERS:
        for shard in TEMPLATE.shards(layer.name):
            written[shard.name] = values_for(shard)
            tree.write(shard, written[shard.name])
    return tree, written
