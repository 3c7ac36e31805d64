"""How a map is covered: the network's windows, the halo that is cut, the map's own shards.

What the region file leaves open of the windows follows from the checkpoint and the grid alone,
never from how the cube is cut or who computes.
"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.beside import layers_of
from aeheight.cube import Tree
from aeheight.errors import InputError
from aeheight.inference import predict_region
from aeheight.models import Checkpoint
from aeheight.predictor import Predictor, best_device
from aeheight.settings import CubeSettings, PredictSettings
from aeheight.spread import LEVEL
from aeheight.template import Layer, Shard, Template
from aeheight.windows import STRIDE, Lattice, Region, Shape, recut

UNMEASURED_HALO = 64
"""Pixels, for a network whose training measured none."""
_CORE = 1024
"""Pixels that a window keeps: with a halo of 64 it takes 2.8 GB in float32, and 1.27 x the area."""
_CORE_STEP = 256
_LARGEST_CORE = 2048
_HALO_STEP = STRIDE // 2
_MOST_EXTRA = 1.35
"""Computed pixels for every pixel of the map."""


def lattice(settings: PredictSettings, shape: Shape) -> Lattice:
    """The windows over a whole grid, of settings that are `settled`."""
    assert settings.window is not None
    assert settings.halo is not None
    return Lattice(shape, settings.window, settings.halo, settings.blend)


def batches_of(settings: PredictSettings, made: Template, group: str, region: Region) -> int:
    """Forward passes that a region of a group takes; the last is filled up."""
    return ceil(lattice(settings, made.grid(group).shape).count(region) / settings.batch)


def settled(settings: PredictSettings, checkpoint: Checkpoint, cube: Template) -> PredictSettings:
    """The settings with window, halo and shard as numbers.

    Raises:
        InputError: windows that a network would see in different ways.
    """
    halo = settings.halo
    if halo is None:
        halo = halo_of(checkpoint)
        if len(cube.grids) > 1:  # there is no more ground past a zone's edge
            halo = min(halo, cube.cut.halo // _HALO_STEP * _HALO_STEP)
    largest = max(size for grid in cube.grids for size in grid.shape)
    core = _core(halo + settings.blend // 2, settings.shard)
    core = min(core, ceil(largest / STRIDE) * STRIDE)
    window = settings.window or core + 2 * halo + settings.blend
    found = settings.model_copy(update={"halo": halo, "window": window})
    if checkpoint.corrects:
        check_windows(found)
    shard = settings.shard or _shard(lattice(found, (1, 1)).stride, cube.cut, largest)
    return found.model_copy(update={"shard": shard})


def halo_of(checkpoint: Checkpoint) -> int:
    """Pixels that a window's result must lose for seams below 1 % of the map's own RMSE."""
    if not checkpoint.corrects:
        return 0
    if checkpoint.seams is None or checkpoint.rmse is None:
        return UNMEASURED_HALO
    enough = checkpoint.seams.halo(checkpoint.rmse)
    # Where even the widest that was measured is not enough, none below it is either.
    return max((UNMEASURED_HALO, *checkpoint.seams.halos)) if enough is None else enough


def _core(margin: int, shard: int | None) -> int:
    """Pixels that a window keeps: the fewest for which it computes at most 1.35 times the area.

    Of a shard that is given, the largest part that divides it.
    """
    cores = range(_CORE, _LARGEST_CORE, _CORE_STEP)
    core = next((c for c in cores if (1 + 2 * margin / c) ** 2 <= _MOST_EXTRA), _LARGEST_CORE)
    if shard is None or shard % STRIDE:
        return core
    parts = (shard // k for k in range(1, shard // STRIDE + 1) if shard % (k * STRIDE) == 0)
    return next((part for part in parts if part <= core), STRIDE)


def _shard(core: int, cut: CubeSettings, largest: int) -> int:
    """The smallest multiple of a window's core that is no less than the cube's shard."""
    if largest <= cut.shard:
        return cut.shard
    shard = ceil(cut.shard / core) * core
    return cut.shard if shard % cut.chunk else shard


def check_windows(settings: PredictSettings) -> None:
    """Refuse windows that a network would see in different ways; what is open is not judged.

    Raises:
        InputError: window or stride is no multiple of the network's stride.
    """
    window, halo = settings.window or 0, settings.halo
    margins = 2 * (halo or 0) + settings.blend
    if window % STRIDE or (halo is not None and margins % STRIDE):
        raise InputError(
            f"predict: a window ({window or 'open'}) and its stride (window - 2*halo - blend, with "
            f"halo {halo} and blend {settings.blend}) must be multiples of {STRIDE}, the network's "
            "own stride: elsewhere the same ground gives other heights; for example window 256 "
            f"with halo 64. A halo is a multiple of {_HALO_STEP}, a blend of {STRIDE}"
        )


def template(cube: Template, checkpoint: Checkpoint, settings: PredictSettings) -> Template:
    """The map of a cube, before its first pixel."""
    assert settings.shard is not None
    made = {"checkpoint": checkpoint.digest}
    about = {
        "height": {
            "long_name": "predicted height",
            "standard_name": "surface_altitude",
            "units": "m",
            "surface": checkpoint.provenance.surface,
            "vertical_datum": checkpoint.provenance.vertical_datum,
        },
        "novelty": {
            "long_name": "distance of the embedding from those trained on; 1 is the 99th percentile"
            " of the validation ground",
            "units": "1",
        },
        "spread": {
            "long_name": f"half width of the interval about height that holds {LEVEL:.0%} of the"
            " true heights, on ground like that trained on",
            "units": "m",
        },
    }
    told = layers_of(checkpoint, novelty=settings.novelty, spread=settings.spread)
    layers = [
        Layer(name, "float32", np.nan, timed=True, attributes=about[name] | made) for name in told
    ]
    return replace(
        cube,
        layers=tuple(layers),
        cut=cube.cut.model_copy(update={"shard": settings.shard}),
        title=cube.title.replace("cube", "heights", 1),
        ground=tuple(
            runs if runs is None else recut(runs, cube.cut.shard, settings.shard, grid.shape)
            for runs, grid in zip(cube.ground, cube.grids, strict=False)
        ),
    )


def predictor_for(checkpoint: Checkpoint, settings: PredictSettings) -> Predictor:
    """The model on the device that the settings ask for, of the machine that calls.

    Raises:
        InputError: there is no GPU, and one is asked for.
    """
    device = "cpu" if settings.device == "cpu" else best_device()
    if settings.device == "gpu" and device == "cpu":
        raise InputError(
            "predict.device is gpu, and PyTorch sees none on this worker: give it one (and an "
            "image with CUDA), or set predict.device to auto"
        )
    return Predictor(
        checkpoint, device, settings.precision, novelty=settings.novelty, spread=settings.spread
    )


def compute(
    cube: Tree, predictor: Predictor, settings: PredictSettings, shard: Shard, region: Region
) -> NDArray[np.float32]:
    """The layers of a region of the map, (layers, rows, columns), in the year of a shard."""

    def reader(layer: str, year: int | None) -> Callable[[Region], Any]:
        return lambda seen: cube.read(shard.group, layer, year, seen)

    return predict_region(
        predictor.submit,
        lattice(settings, cube.template.grid(shard.group).shape),
        region,
        settings.batch,
        reader("embedding", shard.year),
        reader("prior", None) if predictor.needs_prior else None,
        layers=len(predictor.layers),
    )
