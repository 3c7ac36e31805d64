"""Predict: the cube and a checkpoint to a map of heights, one shard a task."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from aeheight.cluster import Outcome
from aeheight.cube import Tree, create, open_tree, remove_tree
from aeheight.embeddings import BANDS
from aeheight.errors import InputError
from aeheight.inference import predict_region
from aeheight.models import STRIDE, Checkpoint, Predictor, best_device
from aeheight.receipts import Ledger, Receipt, receipt_for
from aeheight.settings import PredictSettings, fingerprint
from aeheight.steps.run import Made, Plan, Run, carry_out
from aeheight.steps.train import load_checkpoint
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template
from aeheight.windows import Lattice, Region, Shape

MODEL = "model.ckpt"
"""The checkpoint a map was made with, kept beside its receipts, where every worker can read it."""

_NETWORK_BYTES_PER_PIXEL = 2_100
"""One pixel of one window at the peak of a U-Net++ with ResNet-18 in float32: measured 1,600 to
2,010 on windows of 256 to 1024 px (a U-Net: 1,030)."""


_SCALE_LIMIT = 1.5
"""A model is used on pixels at most this much larger or smaller than those it was trained on."""


def lattice(settings: PredictSettings, shape: Shape) -> Lattice:
    """The windows over a whole grid."""
    return Lattice(shape, settings.window, settings.halo, settings.blend)


def template(cube: Template, checkpoint: Checkpoint) -> Template:
    """The map of a cube, before its first pixel."""
    about = {
        "long_name": "predicted height",
        "standard_name": "surface_altitude",
        "units": "m",
        "surface": checkpoint.provenance.surface,
        "vertical_datum": checkpoint.provenance.vertical_datum,
        "checkpoint": checkpoint.digest,
    }
    height = Layer("height", "float32", np.nan, timed=True, attributes=about)
    title = cube.title.replace("cube", "heights", 1)
    return replace(cube, layers=(height,), title=title)


def _shards(run: Run, cube: Tree, made: Template, checkpoint: Checkpoint) -> list[Shard]:
    """Every shard of the map, with the cube's shards that its windows see."""
    below = Made(cube.template, run.ledger("cube").done())
    lattices = {grid.name: lattice(run.settings.predict, grid.shape) for grid in made.grids}
    return [
        replace(
            shard,
            inputs=fingerprint(
                below.inputs(
                    shard.group,
                    {"embedding": shard.year}
                    | ({"prior": None} if checkpoint.base == "prior" else {}),
                    lattices[shard.group].hull(shard.region),
                )
            ),
        )
        for shard in made.shards("height")
    ]


def plan(run: Run) -> Plan:
    """What predict would compute, from metadata alone.

    Raises:
        InputError: no cube, no checkpoint, or windows that do not fit the model.
    """
    cube, checkpoint = run.whole_cube(), load_checkpoint(run)
    _check(run, cube, checkpoint)
    if not run.options.overwrite:
        run.ledger("heights").check(_begun_with(run, cube, checkpoint), "predict")
    made, settings = template(cube.template, checkpoint), run.settings.predict
    shards = _shards(run, cube, made, checkpoint)
    lattices = {grid.name: lattice(settings, grid.shape) for grid in made.grids}
    windows = sum(lattices[shard.group].count(shard.region) for shard in shards)
    hulls = [lattices[shard.group].hull(shard.region).size for shard in shards]
    area = sum(shard.region.size for shard in shards)
    window_pixels = settings.batch * settings.window**2
    return Plan(
        "predict",
        {
            "model": checkpoint.model.architecture,
            "checkpoint": checkpoint.digest[:16],
            "shards": len(shards),
            "pending": run.left("heights", shards),
            "windows": windows,
            "window_px": settings.window,
            "halo_px": settings.halo,
            "extra_computation": round(windows * settings.window**2 / area, 2),
            "bytes_to_read": sum(hulls) * BANDS,
            "bytes_to_write": area * 4,
            "peak_worker_bytes": 1_000_000_000
            + max(hulls) * (BANDS + 20)
            + window_pixels
            * (BANDS + (_NETWORK_BYTES_PER_PIXEL if checkpoint.weights else BANDS * 8)),
        },
    )


def check_windows(settings: PredictSettings) -> None:
    """Refuse windows that a network would see in different ways.

    Raises:
        InputError: window or stride is no multiple of the network's stride.
    """
    stride = lattice(settings, (1, 1)).stride
    if stride % STRIDE or settings.window % STRIDE:
        raise InputError(
            f"predict: window {settings.window} and its stride (window - 2*halo - blend = {stride})"
            f" must be multiples of {STRIDE}, the network's own stride: elsewhere the same ground "
            "gives other heights; for example window 256 with halo 64"
        )


def _check(run: Run, cube: Tree, checkpoint: Checkpoint) -> None:
    if checkpoint.weights:
        check_windows(run.settings.predict)
    trained, here = checkpoint.provenance.pixel_metres, cube.template.grids[0].pixel_metres()[0]
    if trained and not 1 / _SCALE_LIMIT < trained / here < _SCALE_LIMIT:
        raise InputError(
            f"the model was trained on pixels of {trained:g} m, this region's are {here:g} m: the "
            "same window shows other ground; use a model trained at this resolution"
        )
    halos = cube.template.cut.halo, run.settings.predict.halo
    if len(cube.template.grids) > 1 and checkpoint.weights and halos[0] < halos[1]:
        raise InputError(
            f"cube.halo {halos[0]} is less than predict.halo {halos[1]}: past a zone's edge the "
            "network would see nothing; make predict.halo smaller, or cube.halo larger"
        )
    if checkpoint.base == "prior" and not any(
        layer.name == "prior" for layer in cube.template.layers
    ):
        raise InputError(
            "the model corrects a prior, and this region has none: give `prior`, or use a model "
            "trained without one"
        )


def _begun_with(run: Run, cube: Tree, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "predict": run.settings.predict.model_dump(mode="json"),
        "checkpoint": checkpoint.digest,
        "cube": cube.identity,
    }


def execute(run: Run) -> Outcome:
    """Predict every pending shard.

    Raises:
        InputError: see `plan`; or another model or other settings than those the map began with.
    """
    cube, checkpoint = run.whole_cube(), load_checkpoint(run)
    _check(run, cube, checkpoint)
    made, ledger = template(cube.template, checkpoint), run.ledger("heights")
    if run.options.overwrite:
        run.discard(ledger.store)
        remove_tree(run.heights)
    else:
        ledger.check(_begun_with(run, cube, checkpoint), "predict")
    tree = create(run.heights, made)
    ledger = ledger.begin(_begun_with(run, cube, checkpoint) | {"heights": tree.identity})
    if not ledger.store.exists(MODEL):
        ledger.store.write(MODEL, checkpoint.to_bytes())
    task = Predict(
        cube.store.uri,
        tree.store.uri,
        tree.identity,
        f"{cube.version} {tree.version}",
        ledger.store.uri,
        ledger.key,
        run.settings.predict,
    )
    return carry_out(run, "predict", ledger, _shards(run, cube, made, checkpoint), task)


@dataclass(frozen=True, slots=True)
class Predict:
    """Makes one shard of the map; travels to workers as these few words."""

    cube: str
    heights: str
    identity: str
    version: str
    """Of the templates of both."""
    ledger: str
    key: str
    settings: PredictSettings

    def __call__(self, shard: Shard) -> Receipt:
        """Read, compute, write, leave the receipt."""
        started = time.monotonic()
        ledger = Ledger(Store(self.ledger))
        cube, heights, predictor = _opened(
            self.cube, self.heights, self.identity, self.version, self.ledger
        )

        def reader(layer: str, year: int | None) -> Callable[[Region], Any]:
            return lambda region: cube.read(shard.group, layer, year, region)

        values = predict_region(
            predictor,
            lattice(self.settings, cube.template.grid(shard.group).shape),
            shard.region,
            self.settings.batch,
            reader("embedding", shard.year),
            reader("prior", None) if predictor.needs_prior else None,
        )
        digest = heights.write(shard, values)
        receipt = receipt_for(shard, values, digest, ~np.isnan(values), self.key, started)
        ledger.leave(receipt)
        return receipt


@lru_cache(maxsize=2)
def _opened(
    cube: str, heights: str, _identity: str, _version: str, ledger: str
) -> tuple[Tree, Tree, Predictor]:
    """Once a worker and map: the model stays on the device."""
    checkpoint = Checkpoint.from_bytes(Store(ledger).read(MODEL))
    return open_tree(Store(cube)), open_tree(Store(heights)), Predictor(checkpoint, best_device())
