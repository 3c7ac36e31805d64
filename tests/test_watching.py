"""What watches a cluster: logs as JSON lines, and metrics that the dashboard's panels ask for."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client
from prometheus_client.parser import text_string_to_metric_families
from yamllint import linter
from yamllint.config import YamlLintConfig

from aeheight.logs import JsonFormatter

DEPLOY = Path(__file__).parents[1] / "deploy"
SETTINGS = DEPLOY / "base" / "logging.yaml"
DASHBOARD = json.loads((DEPLOY / "watching" / "dashboard.json").read_text())
MONITOR_FILE = DEPLOY / "watching" / "podmonitor.yaml"
MONITOR = yaml.safe_load(MONITOR_FILE.read_text())
FUNCTIONS = {"avg", "by", "histogram_quantile", "increase", "max", "rate", "sum"}
OF_THE_TARGET = {"namespace", "pod"}
"""Labels that Prometheus gives a series by where it was scraped."""
OF_DCGM = {"DCGM_FI_DEV_GPU_UTIL": {"Hostname", "gpu"}}
"""NVIDIA's exporter, which cannot run here: metrics and labels by its documentation."""
KEYS = {"time", "level", "logger", "message"}


# --- one record ---------------------------------------------------------------------------------


def record(message: str, *arguments: object, **more: Any) -> logging.LogRecord:
    return logging.LogRecord("a.b", logging.WARNING, "x.py", 1, message, arguments, None, **more)


def test_a_record_is_one_line_of_json():
    one = record("%d shards\nof “%s”", 3, "Ägypten")
    line = JsonFormatter().format(one)
    assert "\n" not in line
    told = json.loads(line)
    assert set(told) == KEYS
    assert told["message"] == "3 shards\nof “Ägypten”"
    assert (told["level"], told["logger"]) == ("WARNING", "a.b")
    when = datetime.fromisoformat(told["time"])
    assert when.utcoffset() == timedelta(0)
    assert abs(when - datetime.fromtimestamp(one.created, UTC)) < timedelta(milliseconds=1)


def test_a_traceback_is_in_the_same_line():
    one = record("it failed", sinfo="Stack (most recent call last):\n  here")
    try:
        raise ValueError("what\nwas wrong")
    except ValueError:
        one.exc_info = sys.exc_info()
    line = JsonFormatter().format(one)
    assert "\n" not in line
    told = json.loads(line)
    assert told["exception"].startswith("Traceback")
    assert told["exception"].endswith("ValueError: what\nwas wrong")
    assert told["stack"].endswith("here")


# --- real processes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A scheduler and a worker, each with its log and the port of its metrics."""

    address: str
    ports: dict[str, int]
    logs: dict[str, Path]
    processes: dict[str, subprocess.Popen[bytes]]

    def scrape(self) -> str:
        """All metrics of both, as Prometheus reads them."""
        return "".join(page(port) for port in self.ports.values())


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """As the pods run them: with the settings file in a folder that DASK_CONFIG names."""
    folder = tmp_path_factory.mktemp("cluster")
    contact, settings = folder / "scheduler.json", folder / "settings"
    settings.mkdir()
    (settings / SETTINGS.name).symlink_to(SETTINGS)
    environment = os.environ | {"DASK_CONFIG": str(settings), "OMP_NUM_THREADS": "1"}
    environment |= {"DASK_TEMPORARY_DIRECTORY": str(folder), "PYTHONWARNINGS": "default"}
    roles = {"scheduler": ["--port", "0"], "worker": ["--no-nanny", "--nthreads", "2"]}
    ports = {role: free_port() for role in roles}
    logs = {role: folder / f"{role}.log" for role in roles}
    processes = {}
    with contextlib.ExitStack() as started:
        for role, options in roles.items():
            at = ["--host", "127.0.0.1", "--scheduler-file", str(contact)]
            at += ["--dashboard-address", f"127.0.0.1:{ports[role]}"]
            processes[role] = subprocess.Popen(
                [sys.executable, "-m", "dask", role, *options, *at],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=started.enter_context(logs[role].open("wb")),
            )
            started.enter_context(processes[role])
            started.callback(processes[role].kill)
        yield Cluster(_address(contact), ports, logs, processes)


def _address(contact: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(contact.read_text())["address"])
        time.sleep(0.05)
    raise TimeoutError("the Dask scheduler did not come up")


@pytest.fixture(scope="module")
def served(cluster, small_run, tmp_path_factory) -> dict[str, set[str]]:
    """Every metric that scheduler, worker and driver serve, with its labels, while it ingests."""
    settings = small_run.settings | {"store": str(tmp_path_factory.mktemp("watched") / "run")}
    region = tmp_path_factory.mktemp("region") / "watched.yaml"
    region.write_text(yaml.safe_dump(settings))
    port, seen = free_port(), []
    driver = subprocess.Popen(
        [sys.executable, "-m", "aeheight.cli", "ingest", str(region), "--scheduler",
         cluster.address, "--metrics-port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with driver:
        while driver.poll() is None:
            with contextlib.suppress(OSError):
                seen.append(page(port))
            time.sleep(0.02)
    assert driver.returncode == 0
    found: dict[str, set[str]] = {}
    for text in (*seen, cluster.scrape()):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_every_line_of_a_log_is_json(cluster):
    with Client(cluster.address) as client:
        client.run(warnings.warn, "a warning of Python's\nin two lines")
    for role in ("worker", "scheduler"):
        cluster.processes[role].send_signal(signal.SIGTERM)
        cluster.processes[role].wait(30)
    logged = {
        r: [json.loads(s) for s in f.read_text().splitlines()] for r, f in cluster.logs.items()
    }
    assert all(set(told) >= KEYS for lines in logged.values() for told in lines)
    for role, lines in logged.items():
        assert {told["logger"] for told in lines} >= {f"distributed.{role}"}
        times = [datetime.fromisoformat(told["time"]) for told in lines]
        assert times == sorted(times)
    warned = [told for told in logged["worker"] if told["logger"] == "py.warnings"]
    assert any("in two lines" in told["message"] for told in warned)


def test_a_driver_can_still_silence_dask_alone(tmp_path):
    program = (
        "import logging, distributed.utils as u\n"
        "with u.silence_logging_cmgr(logging.CRITICAL):\n"
        "    logging.getLogger('distributed.core').error('Dask')\n"
        "    logging.getLogger('aeheight').error('ours')\n"
    )
    (tmp_path / SETTINGS.name).symlink_to(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"DASK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["message"] == "ours"


# --- the dashboard ------------------------------------------------------------------------------


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def asked(expression: str) -> dict[str, set[str]]:
    """The metrics of an expression, with all labels that it names (of any of them)."""
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    labels = {label.strip() for group in grouped for label in group.split(",")} | set(matched)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)|\"[^\"]*\"", " ", expression)
    names = set(re.findall(r"[A-Za-z_]\w*", bare)) - FUNCTIONS
    return dict.fromkeys(names, labels)


@pytest.mark.slow
@pytest.mark.parametrize("expression", expressions())
def test_what_the_dashboard_asks_for_is_there(served, expression):
    known = served | OF_DCGM
    wanted = asked(expression)
    assert wanted
    for name, labels in wanted.items():
        assert name in known, f"nobody serves {name}"
        assert labels <= known[name] | OF_THE_TARGET


def test_an_unknown_metric_would_be_seen():
    known = {"aeheight_pixels_total", "made_up"}
    assert set(asked('sum(rate(aeheight_pixels_total{a="b"}[5m])) / made_up')) == known


def test_the_dashboard_shows_what_a_run_is_watched_by():
    names = {name for expression in expressions() for name in asked(expression)}
    assert names >= {
        "aeheight_shards_total", "aeheight_shards_left", "aeheight_pixels_total",
        "aeheight_time_to_go_seconds", "DCGM_FI_DEV_GPU_UTIL", "dask_worker_memory_bytes",
        "dask_scheduler_workers",
    }  # fmt: skip
    assert any('state="failed"' in expression for expression in expressions())


def test_the_dashboard_has_the_shape_that_grafana_loads():
    assert (DASHBOARD["id"], DASHBOARD["uid"]) == (None, "aeheight")
    assert 36 <= DASHBOARD["schemaVersion"] <= 41  # Grafana 9 to 12
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert (
        variables["datasource"] | {"type": "datasource", "query": "prometheus"}
        == variables["datasource"]
    )
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) == {
        *variables, "__rate_interval",
    }  # fmt: skip
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["targets"]
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        assert {"defaults", "overrides"} == set(panel["fieldConfig"])


def test_no_panel_lies_on_another():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for at in places:
        assert at["x"] >= 0 <= at["y"]
        assert at["w"] > 0 < at["h"]
        assert at["x"] + at["w"] <= 24
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


# --- what Prometheus asks -----------------------------------------------------------------------


def base_pods() -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and containers of every pod of the base."""
    for file in (DEPLOY / "base").glob("*.yaml"):
        for one in yaml.safe_load_all(file.read_text()):
            if one and "template" in (one.get("spec") or {}):
                template = one["spec"]["template"]
                for container in template["spec"]["containers"]:
                    yield template["metadata"]["labels"], container


def test_the_monitor_asks_every_pod_at_every_port_that_serves_metrics():
    assert (MONITOR["apiVersion"], MONITOR["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert set(MONITOR["spec"]) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    asked_ports = {one["port"] for one in MONITOR["spec"]["podMetricsEndpoints"]}
    assert asked_ports == {"http", "metrics"}
    assert all(one["path"] == "/metrics" for one in MONITOR["spec"]["podMetricsEndpoints"])
    wanted = MONITOR["spec"]["selector"]["matchLabels"].items()
    pods = list(base_pods())
    assert len(pods) >= 3
    for labels, container in pods:
        assert wanted <= labels.items()
        assert {port["name"] for port in container.get("ports", ())} - {"comm"} <= asked_ports


@pytest.mark.parametrize("path", [MONITOR_FILE, SETTINGS], ids=lambda path: path.name)
def test_yaml_is_clean(path):
    rules = YamlLintConfig(
        "extends: default\n"
        "rules: {document-start: disable, line-length: {max: 110}, braces: {max-spaces-inside: 0}}"
    )
    assert not list(linter.run(path.read_text(), rules))
