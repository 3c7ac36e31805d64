"""A worker that must go finishes what it has begun: `python -m aeheight.retire`, as a preStop hook.

SIGTERM alone ends a Dask worker at once: what it computes is computed again elsewhere. Here the
scheduler is asked to give it nothing more; then it is waited for what it computes; then its other
tasks go to other workers, and it ends. Nothing is lost without this, but time.

Exit codes: 0 retired, or not known there; 1 it is not, or not all that it had begun is done; 2 bad
input.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Client

from aeheight.contact import reach
from aeheight.errors import InputError

_TURN = 0.2
"""Seconds between two looks."""
_ANSWER = 20.0
"""Seconds for the scheduler to answer."""


def retire(scheduler: str, name: str, patience: float) -> str:
    """Retire a worker from its scheduler.

    Args:
        scheduler: its address; certificates are those of Dask's settings.
        name: of the worker, or its address.
        patience: seconds for all of it; what is then computed is computed again elsewhere.

    Returns:
        What came of it, in words.

    Raises:
        InputError: the scheduler does not answer.
        OSError: it went away meanwhile, no other worker takes the results over, or the time was too
            short for what was begun.
    """
    until = time.monotonic() + patience
    with reach(scheduler, min(patience, _ANSWER), "nothing is lost without it, but time") as client:
        known: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
        found = [at for at, worker in known.items() if name in (at, str(worker["name"]))]
        if not found:
            return f"no worker {name} is known at {scheduler}"
        _told(client, found[0], until, remove=False)
        left = _drained(client, found[0], until)
        if not _told(client, found[0], until, remove=True):
            raise OSError("no other worker takes its results over")
    if left:
        raise OSError(f"{left} tasks were not finished within {patience:g} s; others do them again")
    return f"{name} is retired"


def _told(client: Client, worker: str, until: float, *, remove: bool) -> bool:
    """Have the worker take no more tasks, or be forgotten; tried until it is so.

    A worker is kept while it has results that no other can take over; the driver fetches them soon.
    """
    while True:
        if client.retire_workers(workers=[worker], close_workers=False, remove=remove):
            return True
        if time.monotonic() > until or worker not in client.nthreads():
            return False
        time.sleep(_TURN)


def _drained(client: Client, worker: str, until: float) -> int:
    """Wait for what a worker computes, until the scheduler knows it done.

    Returns:
        How many tasks were left when the time was over.
    """
    begun: set[Any] = set()
    while True:
        begun |= client.run(_executing, workers=[worker])[worker]
        left = begun & set(client.processing().get(worker, ()))
        if not left or time.monotonic() > until:
            return len(left)
        time.sleep(_TURN)


def _executing(dask_worker: Any) -> set[Any]:
    return {task.key for task in dask_worker.state.executing}


def main(arguments: Sequence[str] | None = None) -> int:
    """Retire the worker of this host."""
    summary = "A worker that must go finishes what it has begun, and gets no more."
    parser = argparse.ArgumentParser(prog="python -m aeheight.retire", description=summary)
    known = os.environ.get
    parser.add_argument(
        "--scheduler",
        default=known("DASK_SCHEDULER_ADDRESS"),
        metavar="ADDRESS",
        help="of the scheduler (default: DASK_SCHEDULER_ADDRESS)",
    )
    parser.add_argument(
        "--name",
        default=known("POD_NAME"),
        help="of the worker, or its address (default: POD_NAME)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for all of it (default: 60)",
    )
    options = parser.parse_args(arguments)
    if not options.scheduler or not options.name:
        parser.error("give --scheduler and --name (or DASK_SCHEDULER_ADDRESS and POD_NAME)")
    try:
        sys.stdout.write(f"{retire(options.scheduler, options.name, options.patience)}\n")
    except (InputError, OSError) as error:
        sys.stderr.write(f"{options.name} is not retired in order: {error}\n")
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
