"""A worker that must go finishes what it has begun: `python -m aeheight.retire`, as a preStop hook.

SIGTERM alone ends a Dask worker at once: its shards are computed again elsewhere. Here the
scheduler is asked to give it nothing more; then it is waited for what it computes; then its other
tasks go to other workers. Nothing is lost without it, but time.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from distributed import Client

_TURN = 0.5
"""Seconds between two looks."""


def retire(scheduler: str, name: str, patience: float) -> str:
    """Retire a worker from its scheduler.

    Args:
        scheduler: its address; certificates are those of Dask's settings.
        name: of the worker.
        patience: seconds to wait for the tasks that it computes.

    Returns:
        What came of it, in words.

    Raises:
        OSError: the scheduler does not answer.
    """
    with Client(scheduler, timeout=min(patience, 20.0), set_as_default=False) as client:
        known = client.scheduler_info(n_workers=-1)["workers"].items()
        found = [address for address, worker in known if str(worker["name"]) == name]
        if not found:
            return f"no worker {name} is known at {scheduler}"
        client.retire_workers(workers=found, close_workers=False, remove=False)
        until = time.monotonic() + patience
        while (busy := sum(client.run(_executing, workers=found).values())) and (
            time.monotonic() < until
        ):
            time.sleep(_TURN)
        client.retire_workers(workers=found, close_workers=False, remove=True)
    left = f"; {busy} tasks were not finished within {patience:g} s" if busy else ""
    return f"{name} is retired{left}"


def _executing(dask_worker: Any) -> int:
    return len(dask_worker.state.executing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Retire the worker of this host; 0 where that was told to the scheduler."""
    parser = argparse.ArgumentParser(prog="python -m aeheight.retire", description=__doc__)
    known = os.environ.get
    parser.add_argument("--scheduler", default=known("DASK_SCHEDULER_ADDRESS"), metavar="ADDRESS")
    parser.add_argument("--name", default=known("POD_NAME"), help="of the worker (POD_NAME)")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    if not options.scheduler or not options.name:
        parser.error("give --scheduler and --name (or DASK_SCHEDULER_ADDRESS and POD_NAME)")
    try:
        sys.stdout.write(f"{retire(options.scheduler, options.name, options.patience)}\n")
    except OSError as error:
        sys.stderr.write(f"{options.name} is not retired: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
