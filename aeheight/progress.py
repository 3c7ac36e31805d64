"""How far a step is: lines for people, JSON lines for programs, metrics for Prometheus.

The metrics are in prometheus_client's own registry. The Dask scheduler that runs inside the driver
serves that registry at `/metrics` of its dashboard, next to its own; `served` serves it elsewhere.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from prometheus_client import Counter, Gauge, Histogram, Info, start_http_server

from aeheight.errors import InputError

_RUN = Info("aeheight_run", "What this driver works on.")
_SHARDS = Counter("aeheight_shards", "Shards finished by this driver.", ["step", "state"])
_LEFT = Gauge("aeheight_shards_left", "Shards not yet done or failed.", ["step"])
_PIXELS = Counter("aeheight_pixels", "Pixels of the shards done by this driver.", ["step"])
_TO_GO = Gauge("aeheight_time_to_go_seconds", "Estimated time to the end of the step.", ["step"])
_DURATION = Histogram(
    "aeheight_shard_duration_seconds",
    "Time of a shard on its worker.",
    ["step"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600),
)

_INTERVALS = ((60, 2.0), (3600, 10.0), (float("inf"), 60.0))
"""Up to which age of a step, in seconds, lines are how many seconds apart."""
_REWRITE = 0.5
"""Seconds between two states of the one line on a terminal."""


@dataclass(slots=True)
class Progress:
    """Shards done, failed and left, pixels a second, time to go."""

    label: str
    total: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    """A terminal shows one line that changes; anything else gets a line now and then."""
    as_json: bool = False
    interval: float | None = None
    """Seconds between lines; None is few at first and fewer later."""
    done: int = 0
    failed: int = 0
    pixels: int = 0
    _began: float = field(init=False)
    _origin: float | None = None
    """When the first shard that finished was begun: start-up must not spoil the time to go."""
    _shown: float = float("-inf")
    _open: bool = False
    """Whether the terminal's line has yet to be ended."""

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def left(self) -> int:
        """Shards neither done nor failed."""
        return self.total - self.done - self.failed

    def begin(self) -> None:
        """Say what is to be done, before workers have started."""
        for state in ("done", "failed"):
            _SHARDS.labels(self.label, state)  # a rate needs its zero
        _LEFT.labels(self.label).set(self.left)
        if not self.as_json:
            print(f"{self.label:9} {self.total} shards to do", file=self.stream, flush=True)

    def step(self, pixels: int, *, failed: bool = False, seconds: float | None = None) -> None:
        """Count one shard, and show it if the last line is old enough or it is the last shard.

        Args:
            pixels: of the shard.
            failed: it could not be made; its pixels do not count.
            seconds: that it took on its worker, where known.
        """
        self.done += not failed
        self.failed += failed
        self.pixels += 0 if failed else pixels
        now = time.monotonic()
        if self._origin is None:
            self._origin = self._began if seconds is None else max(self._began, now - seconds)
        self._measure(0 if failed else pixels, failed, seconds, now - self._origin)
        if now - self._shown >= self._apart(now) or not self.left:
            self._shown = now
            self._show(self.line(now - self._origin))

    def line(self, seconds: float) -> str:
        """The state as text or JSON after so many seconds of work."""
        rate = self.pixels / max(seconds, 1e-9)
        to_go = self._to_go(seconds)
        if self.as_json:
            return json.dumps(
                {
                    "step": self.label,
                    "done": self.done,
                    "failed": self.failed,
                    "left": self.left,
                    "pixels_per_second": round(rate),
                    "seconds_to_go": round(to_go, 1),
                }
            )
        return (
            f"{self.label:9} {self.done:>5} of {self.total} shards done, {self.failed} failed, "
            f"{self.left} left   {rate / 1e6:.2f} Mpx/s   {clock(to_go)} to go"
        )

    def note(self, text: str) -> None:
        """Say something on a line of its own."""
        self.end()
        said = json.dumps({"step": self.label, "warning": text})
        print(said if self.as_json else f"{self.label:9} {text}", file=self.stream, flush=True)

    def end(self) -> None:
        """Leave the terminal's line as it is; what follows begins a new one."""
        if self._open:
            print(file=self.stream, flush=True)
            self._open = False

    def _to_go(self, seconds: float) -> float:
        return self.left * seconds / max(self.done + self.failed, 1)

    def _measure(self, pixels: int, failed: bool, seconds: float | None, age: float) -> None:
        _SHARDS.labels(self.label, "failed" if failed else "done").inc()
        _PIXELS.labels(self.label).inc(pixels)
        _LEFT.labels(self.label).set(self.left)
        _TO_GO.labels(self.label).set(self._to_go(age))
        if seconds is not None:
            _DURATION.labels(self.label).observe(seconds)

    @property
    def _in_place(self) -> bool:
        return not self.as_json and self.stream.isatty()

    def _apart(self, now: float) -> float:
        if self.interval is not None:
            return self.interval
        if self._in_place:
            return _REWRITE
        return next(apart for until, apart in _INTERVALS if now - self._began < until)

    def _show(self, line: str) -> None:
        if not self._in_place:
            print(line, file=self.stream, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be rewritten
        print(f"\r\x1b[K{line[:width]}", end="", file=self.stream, flush=True)
        self._open = True
        if not self.left:
            self.end()


def clock(seconds: float) -> str:
    """`0:42`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_run(region: str, version: str) -> None:
    """Name what the driver works on, in `aeheight_run_info`."""
    _RUN.info({"region": region, "version": version})


@contextmanager
def served(port: int | None) -> Iterator[None]:
    """Serve the metrics at `/metrics` of a port of this machine, while inside; None serves nothing.

    Raises:
        InputError: the port cannot be had.
    """
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port)
    except OSError as error:
        raise InputError(
            f"metrics cannot be served at port {port} ({error.strerror}); "
            "name another with --metrics-port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
