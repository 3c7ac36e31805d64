"""The split, recorded in the cube: for training, and for testing a model trained elsewhere."""

import time
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree
from aeheight.errors import InputError
from aeheight.grid import Grid, owned
from aeheight.patches import UNUSED, draw_split
from aeheight.receipts import receipt_for
from aeheight.settings import RegionSettings, fingerprint
from aeheight.sources.areas import area_touches, read_area, read_shapes
from aeheight.steps.run import Run
from aeheight.template import Shard


def split_fingerprint(settings: RegionSettings) -> str:
    """What a checkpoint remembers of the split that it was trained on."""
    return fingerprint(split_settings(settings))


def split_settings(settings: RegionSettings) -> dict[str, Any]:
    """All that a split depends on besides the grid, with the content of files that it names.

    Raises:
        InputError: such a file is missing or is no GeoJSON.
    """
    wanted = settings.split
    areas = {"test": wanted.test, "validation": wanted.validation}
    return wanted.model_dump(mode="json") | {
        f"{name}_area": fingerprint(read_shapes(settings, area, "split"))
        for name, area in areas.items()
        if isinstance(area, str)
    }


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
    tree = run.open_cube()
    _refuse_empty_areas(run.settings, tree.template.grids)
    settings = {"split": split_settings(run.settings), "cube": tree.identity}
    ledger = run.ledger("split").begin(settings)
    for shard in ledger.pending(tree.template.shards("split")):
        started = time.monotonic()
        use = _draw(run, tree, shard)
        digest = tree.write(shard, use)
        ledger.leave(receipt_for(shard, use, digest, use != UNUSED, ledger.key, started))
    return fingerprint(settings["split"])


def _refuse_empty_areas(settings: RegionSettings, grids: Sequence[Grid]) -> None:
    split = settings.split
    blocks = [ceil(g.shape[0] / split.block) * ceil(g.shape[1] / split.block) for g in grids]
    for name, wanted in (("test", split.test), ("validation", split.validation)):
        if isinstance(wanted, float | int):
            if wanted and not any(round(wanted * number) for number in blocks):
                raise InputError(
                    f"split.{name}: {wanted:g} of {max(blocks)} blocks rounds to none; make "
                    f"split.block ({split.block} px) smaller"
                )
        elif len(grids) > 1 and not isinstance(wanted, str):
            raise InputError(
                f"split.{name}: bounds are in the CRS of one grid, and the region has "
                f"{[grid.name for grid in grids]}; give a GeoJSON file in degrees"
            )
        elif not any(area_touches(settings, wanted, grid) for grid in grids):
            grid = grids[0]
            raise InputError(
                f"split.{name}: {wanted!r} holds no ground of the grid {list(grid.bounds)}; bounds "
                f"are in its CRS ({grid.crs}), GeoJSON in degrees"
            )


def _draw(run: Run, tree: Tree, shard: Shard) -> NDArray[np.uint8]:
    settings, grid = run.settings.split, tree.template.grid(shard.group)
    seen = grid.part(shard.region.expand(settings.buffer))
    test, validation = (
        read_area(run.settings, wanted, seen) for wanted in (settings.test, settings.validation)
    )
    around = shard.region.expand(settings.buffer)
    foreign = ~owned(tree.template.grids, grid, around)
    return draw_split(settings, grid.shape, shard.region, test, validation, foreign)
