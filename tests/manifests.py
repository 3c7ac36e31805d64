"""What `kubectl apply -k` would send, for the tests of deploy/."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "base"
REDUCED = ROOT / "tests" / "kube" / "reduced"
OVERLAYS = {
    path.name: path
    for path in sorted((DEPLOY / "overlays").iterdir())
    if not path.name.startswith("mine")  # a user's own
}
RENDERED = {"base": BASE, **OVERLAYS, "reduced": REDUCED}
"""Every folder that somebody applies."""
KUBECTL = shutil.which("kubectl") is not None
needs_kubectl = pytest.mark.skipif(not KUBECTL, reason="no kubectl here")

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """Of one workload."""

    owner: Object
    """Deployment, Job or DaskCluster."""
    labels: dict[str, str]
    spec: Object

    @property
    def main(self) -> Object:
        """The container."""
        (container,) = self.spec["containers"]
        return container

    @property
    def role(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def ours(self) -> bool:
        """Whether it runs aeheight's image."""
        return "aeheight" in self.main["image"]


def arguments(pod: Pod) -> list[str]:
    """Of the pod's container."""
    found: list[str] = pod.main["args"]
    return found


@cache
def kustomize(folder: Path) -> list[Object]:
    """What kustomize makes of a folder; do not change it."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def assemble(folder: Path) -> list[Object]:
    """The objects of a kustomization, for the three features that the base uses; no name hashes."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "configMapGenerator", "images"}
    assert set(kustomization) <= known, "teach assemble() what the kustomization now uses"
    objects = [
        document
        for resource in kustomization["resources"]
        for document in yaml.safe_load_all((folder / resource).read_text())
    ]
    for generator in kustomization["configMapGenerator"]:
        assert set(generator) <= {"name", "files", "options"}
        assert set(generator["options"]) <= {"labels"}
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": generator["name"], "labels": generator["options"]["labels"]},
                "data": {name: (folder / name).read_text() for name in generator["files"]},
            }
        )
    images = {
        image["name"]: f"{image['newName']}:{image['newTag']}" for image in kustomization["images"]
    }
    for container in containers(objects):
        container["image"] = images.get(container["image"], container["image"])
    return objects


def rendered(folder: Path) -> list[Object]:
    """A folder's objects; the base's also where there is no kubectl."""
    return kustomize(folder) if KUBECTL else assemble(folder)


def overlay(name: str) -> list[Object]:
    return kustomize(OVERLAYS[name])


def pods(objects: list[Object]) -> list[Pod]:
    """The pods of every workload, those too that the Dask operator makes."""
    found = []
    for o in objects:
        if "template" in o.get("spec", {}):
            template = o["spec"]["template"]
            found.append(Pod(o, template["metadata"]["labels"], template["spec"]))
        if o["kind"] == "DaskCluster":
            for role in ("scheduler", "worker"):
                part = o["spec"][role]
                labels = o["metadata"]["labels"] | part["metadata"]["labels"]
                added = {"dask.org/cluster-name": "aeheight", "dask.org/component": role}
                found.append(Pod(o, labels | added, part["spec"]))
    return found


def containers(objects: list[Object]) -> list[Object]:
    return [c for pod in pods(objects) for c in pod.spec["containers"]]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [o for o in objects if o["kind"] == kind]


def names(objects: list[Object], kind: str) -> set[str]:
    return {o["metadata"]["name"] for o in of_kind(objects, kind)}


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in of_kind(objects, kind) if o["metadata"]["name"] == name]
    return found


def pod_of(objects: list[Object], name: str) -> Pod:
    """The pod of the workload of that name."""
    (found,) = [pod for pod in pods(objects) if pod.owner["metadata"]["name"] == name]
    return found


def config(objects: list[Object], name: str) -> dict[str, str]:
    """A ConfigMap's data."""
    data: dict[str, str] = named(objects, "ConfigMap", name)["data"]
    return data


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """A container's variables, less those of Secrets; what is known only in the pod is ''."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= config(objects, source["configMapRef"]["name"])
    return found | {v["name"]: v.get("value", "") for v in container.get("env", [])}


def quantity(text: str | int) -> float:
    """Bytes or cores of a resource."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3}
    text = str(text)
    unit = next((u for u in units if text.endswith(u)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def chooses(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector chooses a pod."""
    known = {"matchLabels", "matchExpressions"}
    assert set(selector) <= known
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(e["key"]) in e["values"] for e in expressions
    )


def ways(objects: list[Object], direction: str, pod: dict[str, str]) -> list[Object] | None:
    """The rules of all policies that choose a pod; None: it may do anything."""
    policies = [
        o["spec"]
        for o in of_kind(objects, "NetworkPolicy")
        if chooses(o["spec"]["podSelector"], pod) and direction in o["spec"]["policyTypes"]
    ]
    if not policies:
        return None
    return [rule for spec in policies for rule in spec.get(direction.lower(), [])]


def allowed(
    rules: list[Object] | None, peer: dict[str, str] | None, space: dict[str, str], port: int
) -> bool:
    """Whether rules let a peer through: a pod of this namespace, of another, or an address."""
    if rules is None:
        return True
    for rule in rules:
        peers = rule.get("from", rule.get("to"))
        near = peer is not None and not space
        met = peers is None or any(
            (near and chooses(p["podSelector"], peer))
            if "podSelector" in p
            else bool(space) and chooses(p["namespaceSelector"], space)
            for p in peers
        )
        if met and any(p["port"] == port for p in rule["ports"]):
            return True
    return False


ROLES = {
    role: {"app.kubernetes.io/name": "aeheight", "app.kubernetes.io/component": role}
    for role in ("scheduler", "worker", "driver")
}
"""Labels of each role's pods."""
