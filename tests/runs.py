"""Runs for the tests: region files of the small world, the command, and what it left behind."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from aeheight.cli import main
from aeheight.cube import open_tree
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger, verify
from aeheight.store import Store
from aeheight.trust import Trust
from pipelines.world import World

STEPS = ("ingest", "train", "predict", "evaluate")


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Region:
    """A region file and its store."""

    path: Path
    settings: dict[str, Any]

    @property
    def store(self) -> Path:
        return Path(self.settings["store"])

    @property
    def cube(self) -> Path:
        return self.store / "cube.zarr"

    @property
    def heights(self) -> Path:
        return self.store / "heights.zarr"

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.store / "report" / "metrics.json").read_text())

    def receipts(self, name: str) -> list[Path]:
        """Of `cube`, `split`, `heights` or `report`."""
        return sorted((self.store / f"{name}.receipts").rglob("r*-c*-*x*.json"))


@dataclass(frozen=True)
class Regions:
    """Writes region files into a folder."""

    folder: Path
    base: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, **changes: Any) -> Region:
        """A region file and a store of that name; mappings are merged, anything else replaced."""
        settings = deepcopy(self.base) | {"name": "small", "store": str(self.folder / name)}
        for key, value in changes.items():
            old = settings.get(key)
            merge = isinstance(value, dict) and isinstance(old, dict)
            settings[key] = old | value if merge else value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return Region(path, settings)


def small_settings(world: World) -> dict[str, Any]:
    """As pipelines/regions/demo.yaml, in small; the network corrects the ridge."""
    west, south, east, north = world.bounds
    about = {"surface": "dsm", "vertical_datum": "EPSG:5773"}
    return {
        "grid": {"crs": world.crs, "resolution": 10, "bounds": list(world.bounds)},
        "embeddings": {"source": "cog", "href": str(world.embeddings), "year": 2021},
        "height": {"source": "stac", "href": str(world.height), **about},
        "prior": {"source": "raster", "href": str(world.prior), **about},
        "cube": {"shard": 64, "chunk": 32},
        "split": {
            "test": [(west + east) / 2, south, east, north],
            "validation": 0.2,
            "block": 16,
            "buffer": 2,
        },
        "model": {
            "architecture": "unetplusplus",
            "base": "ridge",
            "patch": 32,
            "batch": 8,
            "epochs": 2,
            "patches_per_epoch": 16,
        },
        "predict": {"window": 128, "halo": 32, "batch": 2},
    }


def run_here(*arguments: str | Path) -> Result:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Result(code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and hash of every file."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.blake2b(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def believe(region: Region) -> None:
    """Let the network of a trained run count, whatever its ground proved: a map is then made by it.

    What little training a test can give earns no trust, and the map would be the base alone.
    """
    path = region.store / "model" / "best.ckpt"
    checkpoint = Checkpoint.from_bytes(path.read_bytes())
    path.write_bytes(replace(checkpoint, trust=Trust(0.75, 0.5)).to_bytes())


def copied(region: Region, regions: Regions, name: str = "copy") -> Region:
    """Another region file with a copy of a store (checkpoints are linked: they are large)."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".ckpt") else shutil.copy2)(source, target)

    twin = regions.write(name)
    shutil.copytree(region.store, twin.store, copy_function=copy)
    return twin


def flip(path: Path) -> None:
    """Turn one byte over in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def one_message(error: str, *words: str) -> None:
    """One clear message on stderr, and no traceback."""
    assert "Traceback" not in error
    assert error.count("aeheight: ") == 1, error
    for word in words:
        assert word in error


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every layer of the one group of a tree, read by xarray alone."""
    with xr.open_datatree(path, engine="zarr") as tree:
        (group,) = tree.children.values()
        return {str(name): values.to_numpy() for name, values in group.data_vars.items()}


def same_map(region: Region, other: Region) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(arrays(region.heights)["height"], arrays(other.heights)["height"])


def whole_shards(region: Region, name: str = "heights") -> int:
    """How many shards have a receipt in the `heights` or `cube`; each of them must be whole."""
    tree = open_tree(Store.at(region.store / f"{name}.zarr"))
    checked = list(verify(tree, Ledger(Store.at(region.store / f"{name}.receipts"))))
    assert not any(checked)
    return len(checked)
