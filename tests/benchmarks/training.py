"""The loader beside the model, and block by block beside wholly random order.

    python -m tests.benchmarks.training [--device cpu|gpu] [--edge 2048] [--memory 64] [--rounds 3]
    python -m tests.benchmarks.training --quality runs/demo [--seeds 3]

The first makes a cube of real codes, mirrored, that is several times as large as the memory that
patches may hold, and draws one epoch from it in each way, in turn, again and again; medians are
printed. Decoded is the share of the training ground's bytes that an epoch decodes. The model is
steps of the network alone, on one batch that lies on the device.

The second trains on a finished run's cube, cut anew into small chunks so that its blocks are many,
with room for all of them and for a few, and prints what each reaches on validation ground.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from aeheight.batches import Batch, Epoch
from aeheight.cube import Tree, create, open_tree
from aeheight.embeddings import BAND_NAMES, NODATA
from aeheight.grid import Grid
from aeheight.learning import Machine
from aeheight.models import HeightModel, Provenance
from aeheight.patches import PIXEL_BYTES, Patches, Spot
from aeheight.recipe import Recipe, mean_square
from aeheight.ridge import Ridge
from aeheight.settings import CubeSettings, ModelSettings
from aeheight.splits import TRAIN, UNUSED
from aeheight.store import Store
from aeheight.template import Layer, Template
from aeheight.training import fit
from tests.benchmarks import TILE, cpu_seconds, machine, markdown, mirrored, real_codes

HELD = 27
"""Blocks in memory while order is judged: as many as 2 GB hold of 1024 px."""


@dataclass(frozen=True)
class Drawn:
    """One epoch."""

    rate: float
    """Patches a second."""
    cpu: float
    """CPU milliseconds a patch."""
    decoded: float
    """Bytes decoded / bytes of the training ground."""


def make_cube(folder: Path, codes: np.ndarray, edge: int) -> Tree:
    """A cube of mirrored codes, all of it training ground."""
    grid = Grid("EPSG:32610", 10, 400_000, 4_000_000, (edge, edge))
    layers = (
        Layer("embedding", "int8", NODATA, timed=True, bands=BAND_NAMES),
        Layer("height", "float32", np.nan),
        Layer("split", "uint8", UNUSED),
    )
    template = Template((grid,), layers, (2021,), CubeSettings(), "cube of a benchmark")
    tree = create(Store.at(folder / "cube.zarr"), template)
    values = mirrored(codes, edge)
    height = values[:8].astype(np.float32).mean(axis=0)
    every = {"embedding": values, "height": height, "split": np.full_like(height, TRAIN, np.uint8)}
    for name, whole in every.items():
        for shard in template.shards(name):
            tree.write(shard, np.ascontiguousarray(whole[(..., *shard.region.slices)]))
    return tree


def swept(tree: Tree, patch: int, room: float) -> Patches:
    """Patches that know their ground."""
    patches = Patches(tree, patch, 0, cache_bytes=int(room))
    for _ in patches.sweep():
        pass
    return patches


class _Single:
    """Each patch by itself: nothing is kept."""

    def __init__(self, patches: Patches) -> None:
        self._patches = patches

    def read(self, spot: Spot) -> Any:
        """As `Patches.read`."""
        self._patches.pool.loaded += PIXEL_BYTES * sum(
            unit.region.size for unit in self._patches._units(spot)
        )
        return self._patches._load(spot)


def ways(tree: Tree, patch: int, room: int) -> dict[str, Callable[[], Drawn]]:
    """Every way to draw an epoch."""
    tight, roomy = swept(tree, patch, room), swept(tree, patch, 2**40)
    random = roomy.epoch(1)

    def draw(patches: Patches, ground: Any, spots: Callable[[], Sequence[Spot]]) -> Drawn:
        before, begun, cpu = patches.pool.loaded, time.monotonic(), cpu_seconds()
        epoch = Epoch(ground, spots(), 16, (0, 1), Recipe())
        number = sum(len(batch.codes) for batch in epoch)
        seconds = time.monotonic() - begun
        return Drawn(
            number / seconds,
            1e3 * (cpu_seconds() - cpu) / number,
            (patches.pool.loaded - before) / patches.ground_bytes(),
        )

    def lately() -> Drawn:
        tight.pool.expect({})
        return draw(tight, tight, lambda: random)

    return {
        "each patch by itself": lambda: draw(roomy, _Single(roomy), lambda: random),
        "random order, what was read lately is kept": lately,
        "block by block": lambda: draw(tight, tight, lambda: tight.epoch(1)),
        "all in memory": lambda: draw(roomy, roomy, lambda: random),
    }


def model_rate(patch: int, batch: int, device: str, steps: int) -> float:
    """Patches a second that a U-Net++ takes in while it trains."""
    torch.manual_seed(0)
    model = HeightModel(ModelSettings(), "none", Ridge(np.zeros(64), 0.0, 0.0, 1), 1.0)
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    given = _batch(patch, batch, torch.device(device))
    there = torch.ones_like(given.height, dtype=torch.bool)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = model.correction(given.codes)
        mean_square(output.float(), given.height, there, given.height).backward()
        optimizer.step()
        optimizer.zero_grad()

    def waited() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    for _ in range(2):
        step()
    begun = waited()
    for _ in range(steps):
        step()
    return steps * batch / (waited() - begun)


def _batch(patch: int, batch: int, device: torch.device) -> Batch:
    codes = torch.randint(-127, 128, (batch, 64, patch, patch), dtype=torch.int8)
    plain = torch.zeros(batch, patch, patch)
    return Batch(codes, plain, plain.to(torch.uint8), None).to(device)


def loader(arguments: argparse.Namespace) -> Iterator[str]:
    """The tables of the first program."""
    device = "cuda" if arguments.device == "gpu" else "cpu"
    room = arguments.memory * 10**6
    with TemporaryDirectory(dir=arguments.folder) as folder:
        tree = make_cube(Path(folder), real_codes(arguments.tile), arguments.edge)
        ground = arguments.edge**2 * PIXEL_BYTES / 1e6
        yield f"{ground:.0f} MB of ground, {arguments.memory} MB of memory; {arguments.device}.\n"
        for patch in arguments.patch:
            drawing = ways(tree, patch, room)
            found: dict[str, list[Drawn]] = {name: [] for name in drawing}
            rates = []
            for _ in range(arguments.rounds):
                for name, draw in drawing.items():
                    found[name].append(draw())
                rates.append(model_rate(patch, arguments.batch, device, arguments.steps))
            model = median(rates)
            rows = [
                [name, median(d.rate for d in each), median(d.rate for d in each) / model,
                 median(d.cpu for d in each), median(d.decoded for d in each)]
                for name, each in found.items()
            ]  # fmt: skip
            yield f"Patches of {patch} px; the model alone takes {model:.3g} a second.\n"
            yield (
                markdown(["order", "patches/s", "x the model", "CPU ms a patch", "decoded"], rows)
                + "\n"
            )


def recut(tree: Tree, folder: Path, chunk: int) -> Tree:
    """The same cube in other chunks."""
    cut = CubeSettings(shard=16 * chunk, chunk=chunk)
    template = replace(tree.template, cut=cut)
    other = create(Store.at(folder / "recut.zarr"), template)
    for layer in template.layers:
        for shard in template.shards(layer.name):
            values = tree.read(shard.group, shard.layer, shard.year, shard.region)
            other.write(shard, values)
    return other


def quality(arguments: argparse.Namespace) -> Iterator[str]:
    """The table of the second program."""
    model = ModelSettings(architecture="unet", patch=32, batch=16, epochs=arguments.epochs,
                          patches_per_epoch=256)  # fmt: skip
    about = Provenance("cube", "split", "dsm", "EPSG:5773", (2021,), "v1", "0")
    rows: list[list[object]] = []
    with TemporaryDirectory(dir=arguments.folder) as folder:
        tree = recut(open_tree(Store.at(arguments.quality).child("cube.zarr")), Path(folder), 16)
        room = HELD * (4 * 16) ** 2 * PIXEL_BYTES
        share = room / swept(tree, model.patch, room).ground_bytes()
        yield f"Memory for {HELD} blocks of 64 px, {100 * share:.0f} % of the training ground.\n"
        for seed in range(arguments.seeds):
            settings = model.model_copy(update={"seed": seed})
            grounds = [
                Patches(tree, model.patch, seed, model.patches_per_epoch, cache_bytes=memory)
                for memory in (2**40, room)
            ]
            found = [
                fit(ground, settings, "ridge", about, machine=Machine("cpu", 1))
                for ground in grounds
            ]
            rows.append([seed, *(each.rmse for each in found)])
    yield markdown(["seed", "wholly random: validation RMSE, m", "block by block"], rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--edge", type=int, default=2048, help="of the cube, px")
    parser.add_argument("--memory", type=int, default=64, help="MB")
    parser.add_argument("--patch", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="of the model, patches")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tile", type=Path, default=TILE)
    parser.add_argument("--folder", type=Path, help="where the cube is made")
    parser.add_argument("--quality", help="a finished run's store, such as runs/demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.device == "gpu" and not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, {torch.get_num_threads()} threads\n")
    for part in quality(arguments) if arguments.quality else loader(arguments):
        print(part, flush=True)


if __name__ == "__main__":
    main()
