"""Where tasks run: worker processes on this machine, or the workers of a given scheduler."""

import ctypes
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from dask import config
from dask.system import CPU_COUNT
from dask.utils import parse_timedelta
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.system import MEMORY_LIMIT
from distributed.utils import silence_logging_cmgr

from aeheight.contact import reach
from aeheight.errors import InputError
from aeheight.settings import Device

THREADS = 2
"""Tasks that a worker here runs at a time: one reads or writes while another computes."""
PATIENCE = 600.0
"""Seconds that a given scheduler's first worker is waited for."""
GPU_THREADS = 4
"""Of a worker with a GPU: its device must never wait for reading, decoding or writing."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MEMORY = {
    "MALLOC_ARENA_MAX": 1,
    "MALLOC_MMAP_MAX_": 0,
    "MALLOC_TRIM_THRESHOLD_": 1 << 35,
    "MALLOC_TOP_PAD_": 1 << 26,
}
"""The C library keeps freed memory for the next chunk or layer, for all threads together. Given
back to the kernel each time, as is usual, a forward pass took 1.5 times the CPU, in page faults;
Dask's own setting made an ingest task take 1.7 times."""
_PRELOADED = ["aeheight.cube", "aeheight.sources"]
"""What every task needs, and takes two seconds to import."""
_TURN = 0.5
"""Seconds between two looks for a GPU."""
_SILENCE = "60s"
"""A worker here that has not been heard of for so long is killed and started anew."""
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait must sleep: spinning ones made training 15 times slower on a busy machine."""


class Connection:
    """A client of a given scheduler, or of worker processes on this machine; opened when needed.

    A context manager: what it opened ends with it.
    """

    def __init__(
        self,
        scheduler: str | None = None,
        workers: int | None = None,
        patience: float = PATIENCE,
        *,
        gpus: int | None = None,
        announce: Callable[[str, str], None] = lambda address, hint: None,
        waiting: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Remember where to connect.

        Args:
            scheduler: such as `tcp://host:8786`, or `tls://host:8786` with the certificates of
                Dask's settings; None starts a cluster here.
            workers: processes here, of two threads each; None is one for every two cores. They
                share the cores evenly.
            patience: seconds to wait for the first worker of a given scheduler, and for the first
                with a GPU where one is asked for (and, up to 20, for the scheduler itself).
            gpus: further processes here, one for each GPU; None is all GPUs that are visible.
            announce: told the dashboard's address, and what its pages lack, once the client is
                open.
            waiting: told, once each, what is waited for.
        """
        self._scheduler = scheduler
        self._workers = workers or max(CPU_COUNT // 2, 1)
        self._patience = patience
        self._gpus = gpus
        self._announce = announce
        self._waiting = waiting
        self._opened = ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._client = None

    def client(self, device: Device = "cpu") -> Client:
        """The client, the same at every call.

        Args:
            device: `gpu` waits for a worker that declares one.

        Raises:
            InputError: no scheduler answers at that address, no worker joins it, none with a GPU
                where one is asked for, or their software is not the driver's.
        """
        if self._client is None:
            self._client = self._remote(self._scheduler) if self._scheduler else self._local()
            self._tell(self._client)
        if device == "gpu":
            self._await_gpu(self._client)
        return self._client

    def _await_gpu(self, client: Client) -> None:
        """Wait for a worker with a GPU: its node may have yet to be bought and started."""
        if gpu_slots(client):
            return
        if self._scheduler is None:  # all workers that there will be are there
            raise no_gpu()
        self._say("a worker with a GPU", self._scheduler)
        until = time.monotonic() + self._patience
        while not gpu_slots(client):
            if client.status != "running":
                raise ConnectionError("the scheduler went away while a GPU was waited for")
            if time.monotonic() > until:
                raise no_gpu(f" at {self._scheduler} within {self._patience:.0f} s")
            time.sleep(_TURN)
        check_software(client)

    def _say(self, what: str, scheduler: str) -> None:
        self._waiting(f"waiting for {what} at {scheduler}, up to {self._patience:.0f} s")

    def _tell(self, client: Client) -> None:
        try:
            address = client.dashboard_link
        except KeyError:  # a scheduler without a dashboard
            return
        bare = self._scheduler is None and find_spec("bokeh") is None
        self._announce(
            address, "pip install 'aeheight[dashboard]' to see its pages" if bare else ""
        )

    def _local(self) -> Client:
        spawning = "distributed.nanny.pre-spawn-environ"
        settings = {
            # From their first moment: what is loaded early reads its threads then, and never again.
            spawning: config.get(spawning) | _MEMORY | _threads(self._workers),
            "distributed.scheduler.worker-ttl": _SILENCE,
            # Memory is kept, so a worker that was paused for it would never work again.
            **dict.fromkeys(
                (f"distributed.worker.memory.{act}" for act in ("target", "spill", "pause")), False
            ),
        }
        with _deaf_to_interrupts(), config.set(settings):
            cluster = SpecCluster(
                scheduler=_scheduler_spec(),
                workers=_worker_specs(self._workers, _devices(self._gpus)),
                silence_logs=logging.CRITICAL,
            )
        client: Client = Client(self._opened.enter_context(cluster))
        self._opened.enter_context(client)
        client.register_plugin(_EndWithDriver())
        return client

    def _remote(self, scheduler: str) -> Client:
        # Dask's own setting may ask for more, where a scheduler's image has yet to be pulled.
        usual = parse_timedelta(config.get("distributed.comm.timeouts.connect"))
        remedy = "start one, or leave --scheduler out to work on this machine"
        client = reach(scheduler, min(max(20, usual), self._patience), remedy)
        try:
            # A scheduler that goes away is one message, and not Dask's tracebacks before it.
            self._opened.enter_context(silence_logging_cmgr(logging.CRITICAL))
            self._opened.enter_context(client)
            if not client.nthreads():
                self._say("a worker", scheduler)
            client.wait_for_workers(1, timeout=self._patience)
        except TimeoutError as error:
            raise InputError(
                f"no worker joined {scheduler} within {self._patience:.0f} s; start some"
            ) from error
        check_software(client)
        return client


def gpu_slots(client: Client) -> dict[str, int]:
    """Address of every worker that declares the resource GPU, and how much of it."""
    workers: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    return {
        address: int(worker["resources"]["GPU"])
        for address, worker in workers.items()
        if worker["resources"].get("GPU", 0) >= 1
    }


def no_gpu(where: str = "") -> InputError:
    """The error where a GPU is asked for, and no worker declares one."""
    return InputError(
        f"no worker declares a GPU{where}: start one worker process for each GPU, such as "
        "`dask worker ADDRESS --nthreads 4 --resources GPU=4`, or compute on CPUs with "
        "--set predict.device=cpu"
    )


def _scheduler_spec() -> dict[str, Any]:
    options = {"host": "127.0.0.1", "port": 0, "protocol": "tcp://"}
    return {
        "cls": Scheduler,
        "options": options | {"dashboard": True, "dashboard_address": "127.0.0.1:0"},
    }


def _worker_specs(workers: int, devices: list[str]) -> dict[int | str, dict[str, Any]]:
    """What worker processes to start: `workers` of them, and one for each GPU."""
    environment = _threads(workers)
    threads = workers * THREADS + len(devices) * GPU_THREADS

    def spec(count: int, env: dict[str, str], resources: dict[str, float]) -> dict[str, Any]:
        options = {
            "host": "127.0.0.1",
            "protocol": "tcp://",
            "nthreads": count,
            "memory_limit": MEMORY_LIMIT * count // threads,
            "resources": resources,
            "env": environment | env,
            "preload": _PRELOADED,
            "dashboard": False,
            "silence_logs": logging.CRITICAL,
        }
        return {"cls": Nanny, "options": options}

    plain = {number: spec(THREADS, {"CUDA_VISIBLE_DEVICES": ""}, {}) for number in range(workers)}
    with_gpus = {
        f"gpu{number}": spec(GPU_THREADS, {"CUDA_VISIBLE_DEVICES": device}, {"GPU": GPU_THREADS})
        for number, device in enumerate(devices)
    }
    return plain | with_gpus


def _threads(workers: int) -> dict[str, str]:
    """What tells a worker's libraries its even share of the cores; what the user set stands."""
    share = dict.fromkeys(_THREAD_VARIABLES, str(max(CPU_COUNT // workers, 1))) | QUIET_THREADS
    return {name: os.environ.get(name, value) for name, value in share.items()}


def _devices(wanted: int | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each worker with a GPU."""
    visible = visible_gpus()
    if wanted is not None and wanted > len(visible):
        raise InputError(f"--gpus {wanted}: {len(visible)} are visible here; ask for no more")
    return visible[:wanted]


def visible_gpus() -> list[str]:
    """The NVIDIA devices that CUDA would show here, without loading CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        found = [path for path in Path("/dev").glob("nvidia*") if re.search(r"\d$", path.name)]
        return [str(number) for number in range(len(found))]
    names = [name.strip() for name in chosen.split(",")]
    # CUDA takes those before the first that does not exist.
    ends = [number for number, name in enumerate(names) if name in ("", "-1")]
    return names[: min(ends, default=len(names))]


class _EndWithDriver(WorkerPlugin):
    """The kernel kills a worker when its driver dies, even one that is stopped or holds the GIL.

    Dask's own watch over the driver is a thread of the worker, which then never runs.
    """

    name = "aeheight-end-with-driver"

    def setup(self, worker: Any) -> None:
        """Run on each worker, and on those that take the place of dead ones."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: it is the driver's, which then ends them in order.

    A terminal sends Ctrl-C to all processes, and each worker would answer with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _teller() -> Callable[[], str]:
    """What tells a process's software; pickled whole, so that it runs where aeheight is missing."""

    def software() -> str:
        import importlib  # noqa: PLC0415
        import platform  # noqa: PLC0415

        def version(name: str) -> str:
            try:
                return f"{name} {importlib.import_module(name).__version__}"
            except ImportError:
                return f"no {name}"

        python = platform.python_version_tuple()
        return f"{version('aeheight')}, {version('distributed')}, Python {python[0]}.{python[1]}"

    return software


software = _teller()
"""`aeheight 0.1.0, distributed 2026.8.0, Python 3.11`: what driver and workers must share.

Tasks and results are pickled, and Dask promises nothing between its releases."""


def check_software(client: Client) -> None:
    """Driver, scheduler and workers must be of the same software.

    Raises:
        InputError: names who differs.
    """
    answers = client.run(software, on_error="return")
    found = {f"the worker {address}": answer for address, answer in answers.items()}
    # Dask unpickles tasks on the scheduler too.
    found["the scheduler"] = client.run_on_scheduler(software)
    here = software()
    for place, there in found.items():
        if there != here and not isinstance(there, OSError):  # it has just gone away
            raise different_software(place, str(there))


def different_software(place: str, there: str) -> InputError:
    """The error for a process whose software is not the driver's."""
    return InputError(
        f"{place} has {there}, but the driver has {software()}; install the same everywhere, best "
        "the same image, and start the driver again: finished shards are kept"
    )
