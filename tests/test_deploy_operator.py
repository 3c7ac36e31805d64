"""deploy/overlays/operator: its objects against the operator's own definitions."""

import copy
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.manifests import (
    BASE,
    ROLES,
    Object,
    Pod,
    allowed,
    arguments,
    kustomize,
    needs_kubectl,
    of_kind,
    overlay,
    pod_of,
    pods,
    ways,
)

CRDS = Path(
    os.environ.get("AEHEIGHT_DASK_CRDS")
    or Path(sys.prefix, "dask-operator/dask_kubernetes/operator/deployment/helm")
    / "dask-kubernetes-operator/crds"
)
"""Where `make` unpacks dask-kubernetes, of which nothing but these files is wanted."""
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="no CRDs of the Dask operator; run make")


@cache
def schema_of(kind: str) -> Object:
    """What the operator's CRD lets through, without what the API server would silently drop."""
    crd = yaml.safe_load((CRDS / f"{kind.lower()}.yaml").read_text())
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    known = {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
    schema: Object = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= known
    return schema


def strict(schema: Object) -> Object:
    """An OpenAPI schema as a JSON schema in which unknown keys are errors."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    if "properties" in made:
        made["properties"] = {name: strict(part) for name, part in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


@needs_kubectl
@needs_crds
@pytest.mark.parametrize("kind", ["DaskCluster", "DaskAutoscaler"])
def test_the_operators_objects_fit_its_definitions(kind):
    (found,) = of_kind(overlay("operator"), kind)
    jsonschema.Draft202012Validator(schema_of(kind)).validate(found)


@needs_kubectl
@needs_crds
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "worker", "replica"), 2),
        (("spec", "worker", "spec", "containers", 0, "envfrom"), []),
        (("spec", "worker", "spec", "terminationGracePeriodSeconds"), "90"),
        (("spec", "scheduler", "service", "ports", 0, "port"), "8786"),
    ],
)
def test_the_definitions_refuse_what_is_wrong(path, value):
    (cluster,) = copy.deepcopy(of_kind(overlay("operator"), "DaskCluster"))
    *parents, last = path
    target = cluster
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema_of("DaskCluster")).validate(cluster)


def differences(one: Object, other: Object, path: str = "") -> Iterator[str]:
    """Where two objects differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}/{number}")
    elif one != other:
        yield path


@needs_kubectl
def test_the_operators_pods_are_those_of_the_base():
    scheduler, worker = (p.spec for p in pods(overlay("operator")) if p.owner["kind"] != "Job")
    usual = [pod_of(kustomize(BASE), f"aeheight-{role}").spec for role in ("scheduler", "worker")]
    place = "/containers/0"
    assert list(differences(usual[0], scheduler)) == []
    assert list(differences(usual[1], worker)) == [
        f"{place}/args/7",  # the name that the operator gives
        f"{place}/env/0/name",
        f"{place}/env/0/value",
        f"{place}/env/0/valueFrom",
        f"{place}/lifecycle/preStop/exec/command",
    ]


@needs_kubectl
def test_the_operator_finds_the_scheduler_and_workers_their_name():
    objects = overlay("operator")
    (cluster,), (scaler,) = (of_kind(objects, f"Dask{kind}") for kind in ("Cluster", "Autoscaler"))
    ports = {p["name"]: p["port"] for p in cluster["spec"]["scheduler"]["service"]["ports"]}
    assert ports == {"tcp-comm": 8786, "http-dashboard": 8787}
    assert f"{cluster['metadata']['name']}-scheduler" == "aeheight-scheduler"
    assert scaler["spec"]["cluster"] == cluster["metadata"]["name"]
    assert 1 <= scaler["spec"]["minimum"] <= scaler["spec"]["maximum"]
    worker = Pod(cluster, {}, cluster["spec"]["worker"]["spec"])
    env = {v["name"]: v.get("value") for v in worker.main["env"]}
    assert env["DASK_SCHEDULER_ADDRESS"].startswith("tls://"), "else the operator sets tcp://"
    assert "$(DASK_WORKER_NAME)" in arguments(worker)
    assert "--no-nanny" in arguments(worker)
    assert not {"Deployment", "Service", "DaskJob"} & {o["kind"] for o in objects}
    operator = {"kubernetes.io/metadata.name": "dask-operator"}
    assert allowed(ways(objects, "Ingress", ROLES["scheduler"]), {"app": "other"}, operator, 8787)
