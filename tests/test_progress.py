"""Progress for people, for programs and for Prometheus."""

import io
import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from aeheight.errors import InputError
from aeheight.progress import Progress, clock, describe_run, served


def shown(progress: Progress) -> list[str]:
    assert isinstance(progress.stream, io.StringIO)
    return progress.stream.getvalue().splitlines()


def test_a_line_for_people() -> None:
    progress = Progress("ingest", 10, done=3, failed=1, pixels=4_000_000)
    assert progress.line(8.0) == (
        "ingest        3 of 10 shards done, 1 failed, 6 left   0.50 Mpx/s   0:12 to go"
    )


def test_a_line_for_machines() -> None:
    progress = Progress("ingest", 10, as_json=True, done=3, failed=1, pixels=4_000_000)
    assert json.loads(progress.line(8.0)) == {
        "step": "ingest",
        "done": 3,
        "failed": 1,
        "left": 6,
        "pixels_per_second": 500_000,
        "seconds_to_go": 12.0,
    }


def test_failed_shards_add_no_pixels() -> None:
    progress = Progress("x", 3, stream=io.StringIO(), interval=0)
    progress.step(100)
    progress.step(100, failed=True)
    assert (progress.done, progress.failed, progress.pixels) == (1, 1, 100)
    assert len(shown(progress)) == 2


def test_lines_come_at_intervals_and_at_the_end() -> None:
    progress = Progress("x", 50, stream=io.StringIO(), interval=3600)
    for _ in range(50):
        progress.step(1)
    lines = shown(progress)
    assert len(lines) <= 2
    assert "50 of 50 shards done, 0 failed, 0 left" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# --- lines --------------------------------------------------------------------------------------


class Clock:
    """Time that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time, in seconds from the beginning."""
    clock = Clock(monkeypatch)

    def set_time(seconds: float) -> None:
        clock.now = 1000 + seconds

    return set_time


def test_lines_grow_fewer_with_time(at: Callable[[float], None]) -> None:
    progress = Progress("x", 100_000, stream=io.StringIO())
    count = []
    for second in range(1, 7300):
        at(second)
        progress.step(1, seconds=0.5)
        if second in (60, 3600, 7200):
            count.append(len(shown(progress)))
    assert count[0] == 30
    assert count[1] - count[0] == pytest.approx(354, abs=1)
    assert count[2] - count[1] == pytest.approx(60, abs=1)


def test_start_up_does_not_spoil_the_time_to_go(at: Callable[[float], None]) -> None:
    """Workers take a minute to start; then two shards finish every ten seconds."""
    progress = Progress("x", 20, stream=io.StringIO(), as_json=True, interval=0)
    to_go = []
    for second in range(70, 170, 10):
        at(second)
        for _ in range(2):
            progress.step(1000, seconds=10)
        to_go.append(json.loads(shown(progress)[-1])["seconds_to_go"])
    assert to_go == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert json.loads(shown(progress)[-1])["pixels_per_second"] == 200


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_changes(
    at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    progress = Progress("x", 3, stream=Terminal())
    progress.begin()
    for second in (1, 2):
        at(second)
        progress.step(1, seconds=1)
    progress.note("something happened")
    at(3)
    progress.step(1, seconds=1)
    lines = progress.stream.getvalue().split("\n")
    assert lines[0] == "x         3 shards to do"
    first, second = lines[1].split("\r\x1b[K")[1:]
    assert first.startswith("x             1 of 3 shards done")
    assert second.startswith("x             2 of 3 shards done")
    assert len(first) == len(second) == 49  # a line that wraps could not be rewritten
    assert lines[2] == "x         something happened"
    assert "3 of 3" in lines[3]
    assert lines[4] == ""


def test_what_is_left_unfinished_ends_its_line() -> None:
    progress = Progress("x", 3, stream=Terminal())
    progress.step(1)
    assert not progress.stream.getvalue().endswith("\n")
    progress.end()
    progress.end()
    assert progress.stream.getvalue().count("\n") == 1


def test_a_note_for_machines_is_json() -> None:
    progress = Progress("x", 3, stream=io.StringIO(), as_json=True)
    progress.note("something happened")
    assert json.loads(*shown(progress)) == {"step": "x", "warning": "something happened"}


# --- metrics ------------------------------------------------------------------------------------


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_metrics_count_what_is_done() -> None:
    step = "metrics-count"
    progress = Progress(step, 5, stream=io.StringIO())
    progress.begin()
    assert sample("aeheight_shards_total", step=step, state="done") == 0
    assert sample("aeheight_shards_total", step=step, state="failed") == 0
    assert sample("aeheight_shards_left", step=step) == 5
    progress.step(100, seconds=0.2)
    progress.step(100, seconds=20)
    progress.step(100, failed=True)
    assert sample("aeheight_shards_total", step=step, state="done") == 2
    assert sample("aeheight_shards_total", step=step, state="failed") == 1
    assert sample("aeheight_shards_left", step=step) == 2
    assert sample("aeheight_pixels_total", step=step) == 200
    assert sample("aeheight_shard_duration_seconds_count", step=step) == 2
    assert sample("aeheight_shard_duration_seconds_sum", step=step) == 20.2
    assert sample("aeheight_shard_duration_seconds_bucket", step=step, le="1.0") == 1
    to_go = sample("aeheight_time_to_go_seconds", step=step)
    assert to_go is not None
    assert to_go >= 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def test_metrics_are_served_while_inside() -> None:
    port = free_port()
    describe_run("norcal", "0.1.0")
    Progress("served", 7, stream=io.StringIO()).begin()
    with served(port), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    (about,) = families["aeheight_run_info"].samples
    assert about.labels == {"region": "norcal", "version": "0.1.0"}
    assert 7 in [each.value for each in families["aeheight_shards_left"].samples]
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("", port))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=re.escape(f"port {port} (")) as caught, served(port):
            pass
    assert "--metrics-port" in str(caught.value)


def test_nothing_is_served_unasked() -> None:
    with served(None):
        pass
