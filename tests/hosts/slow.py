"""`dask worker --preload tests.hosts.slow`: a worker that notes what it begins, and takes its time.

`SLOW_FOLDER` takes a file for every shard begun; its file `seconds` tells how long to dwell after
every layer that a shard writes, so that faults meet half-written shards.
"""

import os
import time
import uuid
from pathlib import Path
from typing import Any

from distributed import get_worker

from aeheight import cluster
from aeheight.cube import Tree
from aeheight.steps import ingest, predict
from aeheight.template import Shard

STEPS = (ingest, predict)
"""Loaded now, which takes seconds, and not in the first task."""
FOLDER = Path(os.environ["SLOW_FOLDER"])


def _noted(task: Any, shard: Shard, wanted: str) -> Any:
    note = f"{shard.region.name}.{get_worker().name}.{uuid.uuid4().hex}"
    (FOLDER / f"{note}.begin").touch()
    result = _attempt(task, shard, wanted)
    (FOLDER / f"{note}.end").touch()
    return result


def _dwelling(tree: Tree, shard: Shard, values: Any) -> str:
    digest = _write(tree, shard, values)
    time.sleep(float((FOLDER / "seconds").read_text()))
    return digest


def dask_setup(_worker: Any) -> None:
    """Run by the worker, before its first task."""
    cluster._attempt = _noted  # tasks name it, and so find this one
    Tree.write = _dwelling


_attempt, _write = cluster._attempt, Tree.write
