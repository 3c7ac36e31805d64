"""What an export has once: pictures of every zone, the model's item, and the collection."""

import hashlib
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aeheight.catalogue import COLLECTION, MODEL, File, collection, model_item
from aeheight.cube import Tree
from aeheight.grid import reproject_bounds
from aeheight.hillshade import coloured_png, shaded_png
from aeheight.receipts import Ledger
from aeheight.steps.pyramids import PYRAMIDS
from aeheight.steps.run import Run
from aeheight.steps.tiles import (
    FOLDER,
    Export,
    key_of,
    picture_cut,
    picture_key,
    receipt_of_files,
)
from aeheight.template import Shard
from aeheight.windows import whole

if TYPE_CHECKING:
    from aeheight.models import Checkpoint

CHECKPOINT = "model.ckpt"
"""The map's model: beside the receipts of the map, and in the export."""


def publish(
    run: Run, task: Export, tree: Tree, ledger: Ledger, tiles: Iterable[Shard], once: Shard
) -> None:
    """Write the pictures, the model and its item, last of all the collection; leave the receipt.

    Args:
        run: whose export it is.
        task: that made the tiles.
        tree: the map.
        ledger: of the tiles.
        tiles: all that were made.
        once: the piece of work that this is.
    """
    started, place = time.monotonic(), run.store.child(FOLDER)
    receipts = ledger.receipts(sorted(tile.name for tile in tiles))
    shards = [Shard.parse(receipt.shard) for receipt in receipts if receipt.valid]
    files: dict[str, str] = {}

    def put(key: str, data: bytes) -> None:
        place.write(key, data)
        files[key] = hashlib.sha256(data).hexdigest()

    beside: dict[str, str] = {}
    for group, year in sorted({(s.group, s.year or 0) for s in shards}):
        members = [s for s in shards if (s.group, s.year) == (group, year)]
        for name, title, data in _pictures(task, ledger, members):
            put(f"{group}/{year}/{name}.png", data)
            beside[f"./{group}/{year}/{name}.png"] = f"{title}, {group}, {year}"
    if place.exists(f"{PYRAMIDS}/zarr.json"):
        beside[f"./{PYRAMIDS}"] = "All zones at halves of their resolution, as GeoZarr multiscales"
    checkpoint = run.ledger("heights").store.read(CHECKPOINT)
    put(CHECKPOINT, checkpoint)
    put(MODEL, _model(task, checkpoint))
    grids = tree.template.grids
    boxes = [reproject_bounds(grid.bounds, grid.crs, "EPSG:4326") for grid in grids]
    items = [f"./{key_of(shard, 'item')}" for shard in shards] + [f"./{MODEL}"]
    note = run.settings.note
    put(COLLECTION, collection(task.origin, note, boxes, tree.template.years, items, beside))
    ledger.leave(receipt_of_files(once, files, ledger.key, started))


def _pictures(
    task: Export, ledger: Ledger, shards: Sequence[Shard]
) -> list[tuple[str, str, bytes]]:
    """Name, title and bytes of the pictures of one group and year."""
    grid = task.grid(shards[0].group)
    heights = np.full(picture_cut(grid.shape, whole(grid.shape)).shape, np.nan, np.float32)
    for shard in shards:
        data = ledger.store.read(picture_key(ledger.key, shard))
        part: NDArray[np.float32] = np.load(io.BytesIO(data))
        place = picture_cut(grid.shape, shard.region).slices
        room = heights[place]
        room[...] = part[: room.shape[0], : room.shape[1]]
    scale = grid.shape[0] / heights.shape[0], grid.shape[1] / heights.shape[1]
    metres = grid.pixel_metres()
    pixel = metres[0] * scale[0], metres[1] * scale[1]
    return [
        ("quicklook", "Heights in colours", coloured_png(heights, pixel)),
        ("hillshade", "Shaded relief", shaded_png(heights, pixel)),
    ]


def _model(task: Export, data: bytes) -> bytes:
    # Only this needs PyTorch, for what the checkpoint says of itself.
    from aeheight.models import Checkpoint  # noqa: PLC0415

    digest = hashlib.sha256(data).hexdigest()
    file = File(f"./{CHECKPOINT}", "the checkpoint", "", len(data), digest, {})
    return model_item(task.origin, _facts(Checkpoint.from_bytes(data)), file)


def _facts(checkpoint: "Checkpoint") -> Mapping[str, Any]:
    model = checkpoint.model
    return {
        "architecture": model.architecture,
        "pretrained": False,
        "parameters": sum(tensor.numel() for tensor in checkpoint.weights.values()),
        "years": checkpoint.provenance.years,
        "hyperparameters": model.model_dump(mode="json", exclude={"architecture"})
        | {"base": checkpoint.base, "trust": checkpoint.trust.to_dict()},
        "torch": version("torch"),
    }
