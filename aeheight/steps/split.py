"""The split, recorded in the cube: for training, and for testing a model trained elsewhere."""

import time

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Shard, Tree
from aeheight.errors import InputError
from aeheight.patches import UNUSED, draw_split
from aeheight.receipts import receipt_for
from aeheight.settings import RegionSettings, fingerprint
from aeheight.sources.areas import read_area
from aeheight.steps.run import Run


def split_fingerprint(settings: RegionSettings) -> str:
    """What a checkpoint remembers of the split that it was trained on."""
    return fingerprint(settings.split.model_dump(mode="json"))


def record_split(run: Run) -> str:
    """Write the use of every pixel into the cube, where it is not there yet.

    It is a pure function of settings and grid and costs little, so the driver does it itself.

    Returns:
        `split_fingerprint`.

    Raises:
        InputError: the region has no reference heights, or the split there is another one.
    """
    if run.settings.height is None:
        raise InputError(
            "the region has no `height`, so only ingest and predict are possible; name a "
            "reference height model to train or to evaluate"
        )
    tree, ledger = run.open_cube(), run.ledger("split")
    split = run.settings.split.model_dump(mode="json")
    key = ledger.begin({"split": split, "cube": tree.identity})
    for shard in ledger.pending(tree.template.shards("split")):
        started = time.monotonic()
        use = _draw(run, tree, shard)
        ledger.leave(receipt_for(shard, use, tree.write(shard, use), use != UNUSED, key, started))
    return split_fingerprint(run.settings)


def _draw(run: Run, tree: Tree, shard: Shard) -> NDArray[np.uint8]:
    settings, grid = run.settings.split, tree.template.grid(shard.group)
    seen = grid.part(shard.region.expand(settings.buffer))
    test, validation = (
        read_area(run.settings, wanted, seen) for wanted in (settings.test, settings.validation)
    )
    return draw_split(settings, grid.shape, shard.region, test, validation)
