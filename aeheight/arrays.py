"""Groups and arrays of a Zarr tree as xarray, rioxarray and odc-geo read them."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.errors import ZarrUserWarning

from aeheight.conventions import Coordinate
from aeheight.shards import compressors
from aeheight.template import Layer, plain_nodata


def create_coordinates(
    group: "zarr.Group", coordinates: Iterable[Coordinate], *, overwrite: bool = False
) -> None:
    """Make coordinate arrays and fill them."""
    for coordinate in coordinates:
        values = coordinate.values
        array = group.create_array(
            coordinate.name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape or "auto",
            dimension_names=[coordinate.name] * values.ndim,
            attributes=coordinate.attributes,
            overwrite=overwrite,
        )
        array[...] = values


def create_layer(
    group: "zarr.Group", layer: Layer, sizes: Mapping[str, int], shard: int, chunk: int
) -> None:
    """Make the array of a layer, empty.

    Args:
        group: to hold it.
        layer: what it is.
        sizes: pixels, bands and years along `y`, `x`, `band` and `time`.
        shard: edge in pixels.
        chunk: edge in pixels, a divisor of `shard`; with all bands, of one year.
    """
    chunks = {**sizes, "time": 1, "y": chunk, "x": chunk}
    shards = chunks | {"y": shard, "x": shard}
    group.create_array(
        layer.name,
        shape=tuple(sizes[dim] for dim in layer.dims),
        chunks=tuple(chunks[dim] for dim in layer.dims),
        shards=tuple(shards[dim] for dim in layer.dims),
        dtype=layer.dtype,
        fill_value=np.dtype(layer.dtype).type(layer.nodata),
        compressors=compressors(layer.dtype),
        dimension_names=layer.dims,
        attributes=layer_attributes(layer),
    )


def layer_attributes(layer: Layer) -> dict[str, Any]:
    """What the array of a layer says of itself."""
    return {
        **layer.attributes,
        "nodata": plain_nodata(layer.nodata),
        "grid_mapping": "spatial_ref",
        # Makes xarray carry the CRS along with every single variable.
        "coordinates": "spatial_ref",
    }


def consolidate(store: Store) -> None:
    """Put all metadata of a store into its root."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
        zarr.consolidate_metadata(store)
