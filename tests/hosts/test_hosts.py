"""A map made on several hosts over mutual TLS, and what may happen to each of them.

Whatever happens, the bytes of the map are those of an undisturbed run.
"""

import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from aeheight import __version__
from pipelines.fault_runs import differing
from pipelines.world import World
from tests.hosts.network import certificates, lacking, tls
from tests.hosts.site import NOTHING, ROOT, TTL, WORKERS, Command, Site, site, wait_for
from tests.runs import Region, Regions, believe, copied, run_here, small_settings

_LACKING = lacking()
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(_LACKING is not None, reason=str(_LACKING)),
]
SHARDS = 16
DWELL = 0.5


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("hosts")) as there:
        yield there


@pytest.fixture(scope="module")
def sound(world: World, tmp_path_factory: pytest.TempPathFactory) -> Region:
    """A map that workers of this machine made; tests must leave it as it is."""
    region = Regions(tmp_path_factory.mktemp("sound"), small_settings(world)).write("sound")
    for verb in ("ingest", "train", "predict"):
        result = run_here(verb, region.path, "--workers", "2")
        assert result.code == 0, result.err
        if verb == "train":
            believe(region)
    return region


@pytest.fixture
def unmapped(regions: Regions, sound: Region) -> Region:
    """The same without its map."""
    region = copied(sound, regions)
    for made in (region.heights, region.store / "heights.receipts"):
        shutil.rmtree(made)
    return region


def begun(hosts: Site, region: Region, env: Mapping[str, str | None] = NOTHING) -> Command:
    """A driver, once every worker computes and some shards are done."""
    driver = hosts.drive("predict", region.path, env=env)

    def amid() -> bool:
        assert driver.alive(), driver.said()
        return len(region.receipts("heights")) >= 2 and all(
            hosts.noted("begin", name) for name in WORKERS
        )

    wait_for(amid, "every worker to begin")
    return driver


def same_map(region: Region, sound: Region) -> None:
    assert not differing(sound.heights, region.heights)
    assert len(region.receipts("heights")) == SHARDS


def finished(driver: Command, region: Region, sound: Region, done: int = SHARDS) -> str:
    code, said = driver.end()
    assert code == 0, said
    assert f"{done} shards done" in said
    assert "Traceback" not in said
    same_map(region, sound)
    return said


def tell(what: str, since: float) -> None:
    print(f"\n{what}: {time.monotonic() - since:.1f} s", flush=True)


def refused(command: Command, *words: str, code: int = 2) -> str:
    """One clear message, and no traceback."""
    found, said = command.end()
    assert found == code, said
    assert "Traceback" not in said
    assert said.count("aeheight: ") == 1, said
    for word in words:
        assert word in said
    return said


# --- nothing happens ----------------------------------------------------------------------------


def test_undisturbed(hosts: Site, unmapped: Region, sound: Region) -> None:
    """The bytes that workers of this machine make."""
    began = time.monotonic()
    hosts.whole()
    tell("scheduler and three workers up", began)
    hosts.dwell(0)
    driver = hosts.drive("predict", unmapped.path)
    finished(driver, unmapped, sound)
    tell("undisturbed map", driver.began)
    assert set(hosts.noted("begin").values()) == {1}


# --- workers ------------------------------------------------------------------------------------


def test_a_worker_is_killed(hosts: Site, unmapped: Region, sound: Region) -> None:
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    hosts.running["one"].kill()
    struck = time.monotonic()
    finished(driver, unmapped, sound)
    tell("a worker killed -9, to the end of the map", struck)
    assert set(hosts.noted("end")) == set(hosts.noted("begin"))


def test_workers_are_told_to_stop(hosts: Site, unmapped: Region, sound: Region) -> None:
    """One has retired before: what it begun is done once. What the other begun, elsewhere again."""
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    hosts.running["two"].process.send_signal(signal.SIGTERM)
    struck = time.monotonic()
    words = ("--scheduler", hosts.address, "--name", "three")
    told = hosts.start("three", "aeheight.retire", *words).end()
    assert told == (0, "three is retired\n")
    tell("retired", struck)
    retired, lost = hosts.noted("begin", "three"), hosts.noted("begin", "two")
    assert hosts.noted("end", "three") == retired
    hosts.running["three"].process.send_signal(signal.SIGTERM)
    finished(driver, unmapped, sound)
    tell("a worker ended by SIGTERM, another after it had retired, to the end of the map", struck)
    assert hosts.noted("begin", "three") == retired
    again = {shard for shard, count in hosts.noted("begin").items() if count > 1}
    assert again <= set(lost)
    for name in ("two", "three"):
        hosts.running[name].end()


def test_silent_workers(hosts: Site, unmapped: Region, sound: Region) -> None:
    """One frozen, one cut off: their shards go to the third; what comes back does no harm."""
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    frozen, cut = hosts.running["one"], hosts.running["two"]
    frozen.process.send_signal(signal.SIGSTOP)
    hosts.hosts["two"].cut()
    struck = time.monotonic()
    try:
        finished(driver, unmapped, sound)
        tell(f"a worker frozen and one cut off (TTL {TTL} s), to the end of the map", struck)
        assert time.monotonic() - struck < 4 * TTL
    finally:
        frozen.process.send_signal(signal.SIGCONT)
        hosts.hosts["two"].plug()
    struck = time.monotonic()
    wait_for(lambda: not frozen.alive() and not cut.alive(), "their end")
    tell("both back, and ended, for others to start them again", struck)
    same_map(unmapped, sound)


# --- scheduler and driver -----------------------------------------------------------------------


def test_the_scheduler_is_lost(hosts: Site, unmapped: Region, sound: Region) -> None:
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    hosts.running["scheduler"].kill()
    struck = time.monotonic()
    refused(driver, "the scheduler went away", "run again", code=1)
    tell("a scheduler killed, the driver ended after", struck)
    wait_for(lambda: not any(hosts.running[name].alive() for name in WORKERS), "the workers' end")
    done = len(unmapped.receipts("heights"))
    hosts.whole().dwell(0)
    tell("scheduler and workers are there again", struck)
    finished(hosts.drive("predict", unmapped.path), unmapped, sound, SHARDS - done)
    tell("the same command went on to the end of the map", struck)


def test_the_driver_is_killed(hosts: Site, unmapped: Region, sound: Region) -> None:
    hosts.whole().dwell(DWELL)
    begun(hosts, unmapped).kill()
    struck = time.monotonic()
    driver = hosts.drive("predict", unmapped.path)
    code, said = driver.end()
    assert code == 0, said
    same_map(unmapped, sound)
    tell("a driver killed -9 and run again, to the end of the map", struck)


def test_the_driver_is_cut_off(hosts: Site, unmapped: Region, sound: Region) -> None:
    """Noticed after Dask's patience with a connection, which is 30 s by itself."""
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped, {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s"})
    hosts.hosts["driver"].cut()
    struck = time.monotonic()
    try:
        refused(driver, "run again", code=1)
    finally:
        hosts.hosts["driver"].plug()
    tell("a driver cut off, ended after", struck)
    hosts.dwell(0)
    assert hosts.drive("predict", unmapped.path).end()[0] == 0
    same_map(unmapped, sound)


# --- who is refused -----------------------------------------------------------------------------


@pytest.fixture
def fresh(regions: Regions) -> Region:
    """A region without anything made yet."""
    return regions.write("fresh")


def test_without_a_certificate(hosts: Site, fresh: Region) -> None:
    hosts.whole()
    bare = dict.fromkeys(tls(Path()))
    refused(hosts.drive("ingest", fresh.path, env=bare), "TLS", "CERT", hosts.address)


def test_with_a_certificate_that_is_not_there(hosts: Site, fresh: Region) -> None:
    refused(hosts.drive("ingest", fresh.path, env=tls(Path("/nowhere"))), "/nowhere/ca.crt")


def test_without_encryption(hosts: Site, fresh: Region) -> None:
    """Whether the driver's settings ask for it or not."""
    plain = hosts.whole().address.replace("tls", "tcp")
    words = ("ingest", fresh.path, "--scheduler", plain)
    refused(hosts.drive(*words), "is not encrypted", hosts.address)
    bare = dict.fromkeys(tls(Path()))
    refused(hosts.drive(*words, env=bare), "no Dask scheduler answers", f"try {hosts.address}")


def test_with_a_certificate_of_another_authority(
    hosts: Site, fresh: Region, tmp_path: Path
) -> None:
    foreign = certificates(tmp_path / "tls")
    env = tls(foreign) | {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(hosts.secrets / "ca.crt")}
    refused(hosts.whole().drive("ingest", fresh.path, env=env), "of another CA")


def test_a_worker_of_another_version(hosts: Site, fresh: Region, tmp_path: Path) -> None:
    code = "import aeheight\naeheight.__version__ = '0.0.9'"
    (tmp_path / "sitecustomize.py").write_text(code)
    hosts.whole().running["one"].kill()
    hosts.start_worker("one", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    wait_for(lambda: hosts.joined("one"), "the worker of another version")
    driver = hosts.drive("ingest", fresh.path)
    try:
        refused(driver, "has aeheight 0.0.9, ", f"the driver has aeheight {__version__}, ")
    finally:
        hosts.running["one"].kill()
    assert not fresh.receipts("cube")
