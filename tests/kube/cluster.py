"""A namespace of a real cluster with aeheight in it, and a store that its pods and we reach."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aeheight.store import Store
from tests.s3 import BUCKET, Server

DEPLOY = Path(__file__).parents[2] / "deploy"
REDUCED = Path(__file__).parent / "reduced"
"""The base without what an API server of 1.20 does not know, and for a small node."""
JOB = "aeheight-run"


def kubectl(*arguments: str, given: str | None = None, check: bool = True) -> str:
    """What kubectl prints."""
    done = subprocess.run(
        ["kubectl", *arguments], input=given, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Space:
    """A namespace."""

    name: str
    folder: Path
    """For the overlay."""
    server: Server

    def __call__(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        return kubectl("--namespace", self.name, *arguments, given=given, check=check)

    def objects(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """All objects of a kind."""
        chosen = ("--selector", selector) if selector else ()
        return json.loads(self("get", kind, *chosen, "--output", "json"))["items"]

    def credentials(self, **changes: str) -> None:
        """The Secret of the store."""
        lines = "".join(f"{k}={v}\n" for k, v in (self.server.variables() | changes).items())
        (self.folder / "store.env").write_text(lines)
        self._secret("aeheight-store", f"--from-env-file={self.folder}/store.env")

    def certificates(self) -> None:
        """The Secret of the certificates, as the runbook makes it."""
        made = self.folder / "certificates"
        if not made.exists():
            subprocess.run([DEPLOY / "certificates", made], check=True, capture_output=True)
        files = [f"--from-file={made}/{name}" for name in ("ca.crt", "tls.crt", "tls.key")]
        self._secret("aeheight-tls", *files)

    def _secret(self, name: str, *sources: str) -> None:
        self("delete", "secret", name, "--ignore-not-found")
        self("create", "secret", "generic", name, *sources)

    def apply(self, region: dict[str, Any], *patches: dict[str, Any]) -> None:
        """The reduced base with a region; patches are as kustomize takes them."""
        place = self.folder / "overlay"
        place.mkdir(exist_ok=True)
        (place / "region.yaml").write_text(yaml.safe_dump(region))
        overlay = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": self.name,
            "resources": [os.path.relpath(REDUCED, place)],
            "configMapGenerator": [
                {"name": "aeheight-region", "behavior": "replace", "files": ["region.yaml"]}
            ],
            "patches": list(patches),
        }
        (place / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        self("delete", "job", JOB, "--ignore-not-found")
        self("apply", "--filename", "-", given=kubectl("kustomize", str(place)))

    def finished(self, seconds: float) -> str:
        """`Complete` or `Failed`, of the driver's Job."""

        def state() -> str | None:
            told = [c for job in self.objects("job") for c in job["status"].get("conditions", ())]
            return next((c["type"] for c in told if c["status"] == "True"), None)

        return until(state, seconds, f"the Job has not ended: {self('get', 'pods')}")

    def driver(self) -> list[dict[str, Any]]:
        """The driver's pods, the last begun last."""
        pods = self.objects("pod", f"job-name={JOB}")
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def said(self) -> str:
        """The log of the driver's last pod."""
        return self("logs", self.driver()[-1]["metadata"]["name"], check=False)

    def last_words(self) -> tuple[int, str]:
        """Exit code and termination message of the driver's last pod."""
        (status,) = self.driver()[-1]["status"]["containerStatuses"]
        ended = status["state"]["terminated"]
        return ended["exitCode"], ended.get("message", "")

    def lose(self, component: str) -> None:
        """Delete one pod of a component by force, as when its node is lost."""
        pods = self.objects("pod", f"app.kubernetes.io/component={component}")
        name = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])["metadata"]["name"]
        self("delete", "pod", name, "--force", "--grace-period=0")


def until(found: Callable[[], Any], seconds: float, otherwise: str) -> Any:
    """Wait for a value."""
    end = time.monotonic() + seconds
    while (value := found()) is None:
        assert time.monotonic() < end, otherwise
        time.sleep(0.5)
    return value


@contextmanager
def space(name: str, folder: Path, server: Server) -> Iterator[Space]:
    """A new namespace, gone in the end."""
    kubectl("create", "namespace", name)
    try:
        yield Space(name, folder, server)
    finally:
        kubectl("delete", "namespace", name, "--wait=false", check=False)


def upload(folder: Path, prefix: str) -> str:
    """Copy a folder into the bucket; its URI there."""
    store = Store.at(f"s3://{BUCKET}/{prefix}")
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return store.uri
