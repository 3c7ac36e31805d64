"""What an export has once: pictures of every zone, the model's item, and the collection."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.catalogue import COLLECTION, MODEL, File, collection, model_item
from aeheight.cube import Tree
from aeheight.grid import reproject_bounds
from aeheight.hillshade import coloured_png, shaded_png
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger
from aeheight.steps.export import FOLDER
from aeheight.steps.predict import MODEL as CHECKPOINT
from aeheight.steps.pyramids import PYRAMIDS, in_pyramids
from aeheight.steps.run import Run
from aeheight.steps.tiles import Export, key_of, picture_cut, picture_key
from aeheight.template import Shard
from aeheight.windows import whole


def publish(run: Run, task: Export, tree: Tree, ledger: Ledger) -> None:
    """Write the pictures, the model's item, and last of all the collection.

    Args:
        run: whose export it is.
        task: that made the tiles.
        tree: the map.
        ledger: of the tiles.
    """
    receipts = ledger.receipts(sorted(n for n in ledger.done() if not in_pyramids(n)))
    shards = [Shard.parse(receipt.shard) for receipt in receipts if receipt.valid]
    place = run.store.child(FOLDER)
    beside: dict[str, str] = {}
    known = {grid.name for grid in tree.template.grids}
    if task.mosaic:
        known.add(task.mosaic.name)
    for group, year in sorted({(s.group, s.year or 0) for s in shards if s.group in known}):
        members = [s for s in shards if (s.group, s.year) == (group, year)]
        for name, title, data in _pictures(task, ledger, members):
            key = f"{group}/{year}/{name}.png"
            place.write(key, data)
            beside[f"./{key}"] = f"{title}, {group}, {year}"
    if place.exists(f"{PYRAMIDS}/zarr.json"):
        beside[f"./{PYRAMIDS}"] = "All zones at halves of their resolution, as GeoZarr multiscales"
    place.write(MODEL, _model(run, task))
    grids = tree.template.grids
    boxes = [reproject_bounds(grid.bounds, grid.crs, "EPSG:4326") for grid in grids]
    items = [f"./{key_of(shard, 'item')}" for shard in shards] + [f"./{MODEL}"]
    note = run.settings.note
    found = collection(task.origin, note, boxes, tree.template.years, items, beside)
    place.write(COLLECTION, found)


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


def _model(run: Run, task: Export) -> bytes:
    store = run.ledger("heights").store
    data = store.read(CHECKPOINT)
    file = File(
        f"../heights.receipts/{CHECKPOINT}", "the checkpoint", "", len(data),
        hashlib.sha256(data).hexdigest(), {},
    )  # fmt: skip
    return model_item(task.origin, _facts(Checkpoint.from_bytes(data)), file)


def _facts(checkpoint: Checkpoint) -> Mapping[str, Any]:
    model = checkpoint.model
    return {
        "architecture": model.architecture,
        "pretrained": False,
        "parameters": sum(tensor.numel() for tensor in checkpoint.weights.values()),
        "years": checkpoint.provenance.years,
        "hyperparameters": model.model_dump(mode="json", exclude={"architecture"})
        | {"base": checkpoint.base},
        "torch": version("torch"),
    }
