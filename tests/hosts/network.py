"""Several hosts on one machine: network namespaces on a switch, and certificates for them.

Needs root on Linux; nothing of the machine's own network is touched.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ASKED = "AEHEIGHT_TEST_HOSTS"
_PREFIX = "aeh"
_TOOLS = ("ip", "nsenter", "setpriv", "openssl")
_SUBNET = "198.18.77"
"""Of the addresses that are set aside for benchmarks of networks."""


def lacking() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if os.environ.get(ASKED) != "1":
        return f"asked for by make test-hosts ({ASKED}=1)"
    if os.geteuid():
        return "needs root, for network namespaces"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    _remove(probe)
    return None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _remove(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


@dataclass(frozen=True)
class Host:
    """A network namespace with one address."""

    name: str
    address: str
    namespace: str
    switch: str
    """The namespace of the bridge."""

    def command(self, *words: str) -> list[str]:
        """A command as this host's; it ends with who started it, and its process id is its own."""
        inside = f"--net=/run/netns/{self.namespace}"
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", inside, *words]

    def cut(self) -> None:
        """Pull the cable: what was sent is lost, and nobody is told."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def plug(self) -> None:
        """Put it back."""
        _ip("-n", self.switch, "link", "set", self.name, "up")


@contextmanager
def network(*names: str) -> Iterator[dict[str, Host]]:
    """Hosts that reach each other; they end with the block."""
    _sweep()
    switch = f"{_PREFIX}{os.getpid()}-switch"
    made = [switch]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        hosts = {}
        for number, name in enumerate(names, 1):
            made.append(namespace := f"{_PREFIX}{os.getpid()}-{name}")
            hosts[name] = Host(name, f"{_SUBNET}.{number}", namespace, switch)
            _attach(hosts[name])
        yield hosts
    finally:
        for namespace in made:
            _remove(namespace)


def _attach(host: Host) -> None:
    _ip("netns", "add", host.namespace)
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    far = ["peer", "name", "eth0", "netns", host.namespace]
    _ip("-n", host.switch, "link", "add", host.name, "type", "veth", *far)
    _ip("-n", host.switch, "link", "set", host.name, "master", "bridge", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _sweep() -> None:
    """Remove what tests that were killed left behind."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        process = name.removeprefix(_PREFIX).split("-")[0]
        if name.startswith(_PREFIX) and process.isdecimal() and not Path("/proc", process).exists():
            _remove(name)


def certificates(folder: Path) -> Path:
    """A folder with `ca.crt`, `tls.crt` and `tls.key`, as a Secret of Kubernetes has them."""
    folder.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl(
        "req", "-x509", *new, "-days", "2", "-subj", "/CN=aeheight CA",
        "-keyout", "ca.key", "-out", "ca.crt",
    )  # fmt: skip
    openssl("req", *new, "-subj", "/CN=aeheight", "-keyout", "tls.key", "-out", "tls.csr")
    openssl(
        "x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-out", "tls.crt",
    )  # fmt: skip
    return folder


def tls(folder: Path) -> dict[str, str]:
    """Dask's settings for certificates, as the environment of scheduler, workers and driver."""
    setting = "DASK_DISTRIBUTED__COMM__"
    return {
        f"{setting}REQUIRE_ENCRYPTION": "True",
        f"{setting}TLS__CA_FILE": str(folder / "ca.crt"),
        **{
            f"{setting}TLS__{role}__{part.upper()}": str(folder / f"tls.{end}")
            for role in ("SCHEDULER", "WORKER", "CLIENT")
            for part, end in (("cert", "crt"), ("key", "key"))
        },
    }
