"""deploy/: what each overlay is for, the certificates, and memory enough for the example."""

import copy
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from aeheight.cube import create
from aeheight.grid import Grid
from aeheight.settings import load_region
from aeheight.sources import Ground, Sources
from aeheight.sources.tile import EmbeddingSource
from aeheight.steps import evaluate, ingest, predict, train
from aeheight.steps.run import Run, cube_settings
from tests import s3
from tests.benchmarks.scale import pretend
from tests.checkpoints import UNET, checkpoint_of, wild_weights
from tests.manifests import (
    BASE,
    DEPLOY,
    KUBECTL,
    OVERLAYS,
    REDUCED,
    RENDERED,
    Object,
    Pod,
    assemble,
    config,
    environment,
    kustomize,
    named,
    names,
    of_kind,
    pod_of,
    pods,
    quantity,
    rendered,
)

needs_kubectl = pytest.mark.skipif(not KUBECTL, reason="no kubectl here")


def overlay(name: str) -> list[Object]:
    return kustomize(OVERLAYS[name])


def arguments(pod: Pod) -> list[str]:
    found: list[str] = pod.main["args"]
    return found


# --- kustomize ----------------------------------------------------------------------------------


def without_hash(objects: list[Object]) -> list[Object]:
    """Generated names as they were before kustomize added the hash of their content."""
    plain = re.sub(r"(aeheight-(?:region|logging))-[0-9a-z]{10}\b", r"\1", yaml.safe_dump(objects))
    return sorted(yaml.safe_load(plain), key=lambda o: (o["kind"], o["metadata"]["name"]))


@needs_kubectl
def test_the_small_loader_equals_kustomize():
    assert without_hash(assemble(BASE)) == without_hash(kustomize(BASE))


def own(folder: Path, **parts: object) -> list[Object]:
    """What a user's own kustomization on the base renders to."""
    folder.mkdir(exist_ok=True)
    whole = {"resources": [os.path.relpath(BASE, folder)]} | parts
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(whole))
    return kustomize(folder)


@needs_kubectl
def test_a_changed_region_changes_the_name_that_the_job_mounts(tmp_path):
    (tmp_path / "region.yaml").write_text("name: mine\n")
    mine = {"name": "aeheight-region", "behavior": "replace", "files": ["region.yaml"]}
    found = own(tmp_path, configMapGenerator=[mine])
    (name,) = names(found, "ConfigMap") - names(kustomize(BASE), "ConfigMap")
    assert config(found, name) == {"region.yaml": "name: mine\n"}
    assert name in yaml.safe_dump(pod_of(found, "aeheight-run").spec)


@needs_kubectl
def test_components_go_together(tmp_path):
    parts = [os.path.relpath(path, tmp_path) for path in (DEPLOY / "components").iterdir()]
    found = own(tmp_path, components=parts)
    gpu = pod_of(found, "aeheight-worker-gpu")
    assert gpu.owner["spec"]["replicas"] == 2
    keys = {t["key"] for t in gpu.spec["tolerations"]}
    assert keys == {"nvidia.com/gpu", "aeheight/spot"}
    assert "Certificate" in {o["kind"] for o in found}


@needs_kubectl
@pytest.mark.parametrize("name", RENDERED)
def test_one_image_rule_reaches_every_pod(tmp_path, name):
    (before,) = {pod.main["image"] for pod in pods(kustomize(RENDERED[name])) if pod.ours}
    rule = {"name": before.rpartition(":")[0], "newName": "mine/aeheight", "newTag": "7"}
    folder = os.path.relpath(RENDERED[name], tmp_path)
    found = own(tmp_path, resources=[folder], images=[rule])
    assert {pod.main["image"] for pod in pods(found) if pod.ours} == {"mine/aeheight:7"}


# --- base: two kinds of workers, budgets, network -----------------------------------------------


def test_gpu_workers_differ_from_the_others_only_in_the_gpu():
    plain, gpu = (
        copy.deepcopy(pod_of(rendered(BASE), name))
        for name in ("aeheight-worker", "aeheight-worker-gpu")
    )
    assert gpu.owner["spec"]["replicas"] == 0
    assert plain.labels.pop("aeheight/device") == "cpu"
    assert gpu.labels.pop("aeheight/device") == "gpu"
    assert gpu.spec.pop("tolerations")
    words = arguments(gpu)
    place = words.index("--resources")
    assert words[place : place + 2] == ["--resources", "GPU=4"]
    del words[place : place + 2]
    for pod in (plain, gpu):
        words = arguments(pod)
        words[words.index("--nthreads") + 1] = "N"
        del pod.main["resources"]
    assert gpu.labels == plain.labels
    assert gpu.spec == plain.spec


def test_drains_take_some_workers_at_a_time_and_never_wait_for_ever():
    (budget,) = of_kind(rendered(BASE), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] not in (0, "0%")
    chosen = budget["spec"]["selector"]["matchLabels"].items()
    held = {pod.role for pod in pods(rendered(BASE)) if chosen <= pod.labels.items()}
    assert held == {"worker"}


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
STRANGER = {"app": "other"}
MONITORS, ELSEWHERE = {"aeheight/monitoring": "true"}, {"name": "other"}


@pytest.mark.parametrize(
    ("source", "space", "target", "port", "may"),
    [
        *((role, {}, "scheduler", 8786, True) for role in ("worker", "driver")),
        ("worker", {}, "worker", 8790, True),
        ("scheduler", {}, "worker", 8790, True),
        ("driver", {}, "worker", 8790, False),
        *((None, {}, "scheduler", port, port == 8787) for port in (8786, 8787)),
        *((None, {}, "worker", port, port == 8788) for port in (8790, 8788)),
        (None, {}, "driver", 8789, True),
        *(
            (None, space, role, port, space is MONITORS)
            for space in (MONITORS, ELSEWHERE)
            for role, port in (("scheduler", 8787), ("worker", 8788), ("driver", 8789))
        ),
        (None, MONITORS, "scheduler", 8786, False),
        (None, MONITORS, "worker", 8790, False),
    ],
)
def test_who_may_speak_with_whom(source, space, target, port, may):
    objects = rendered(BASE)
    sender = ROLES.get(source, STRANGER)
    comes = allowed(ways(objects, "Ingress", ROLES[target]), sender, space, port)
    goes = source is None or allowed(ways(objects, "Egress", sender), ROLES[target], {}, port)
    assert (comes and goes) is may


@pytest.mark.parametrize("role", ROLES)
def test_only_names_and_the_store_are_reached_outside(role):
    out = ways(rendered(BASE), "Egress", ROLES[role])
    reached = {port for port in range(1, 9000) if allowed(out, None, {}, port)}
    assert reached == ({53} if role == "scheduler" else {53, 443})


# --- overlays -----------------------------------------------------------------------------------


@needs_kubectl
def test_gpu_asks_for_gpus_and_takes_nothing_else():
    job = pod_of(overlay("gpu"), "aeheight-run")
    assert arguments(job)[-2:] == ["--set", "predict.device=gpu"]
    assert pod_of(overlay("gpu"), "aeheight-worker-gpu").owner["spec"]["replicas"] == 2


@needs_kubectl
def test_spot_nodes_take_workers_alone():
    objects = overlay("spot")
    for pod in pods(objects):
        affinity = pod.spec["affinity"]["nodeAffinity"]
        kind = "preferred" if pod.role == "worker" else "required"
        (rule,) = affinity.values()
        assert list(affinity) == [f"{kind}DuringSchedulingIgnoredDuringExecution"]
        assert ("NotIn" in yaml.safe_dump(rule)) is (pod.role != "worker")
        tolerated = {t["key"] for t in pod.spec.get("tolerations", [])}
        assert ("aeheight/spot" in tolerated) is (pod.role == "worker")
        if pod.role == "worker":
            assert pod.spec["terminationGracePeriodSeconds"] < 30
            priority = named(objects, "PriorityClass", pod.spec["priorityClassName"])["value"]
            assert -10 <= priority < 0
    more, usual = (
        int(config(o, "aeheight-dask")["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"])
        for o in (objects, rendered(BASE))
    )
    assert more > usual


@needs_kubectl
def test_training_is_one_job_with_shared_memory():
    (pod,) = pods(overlay("training"))
    assert arguments(pod)[0] == "train"
    mounts = {m["mountPath"]: m["name"] for m in pod.main["volumeMounts"]}
    shm = next(v["emptyDir"] for v in pod.spec["volumes"] if v["name"] == mounts["/dev/shm"])
    limits = pod.main["resources"]["limits"]
    assert shm["medium"] == "Memory"
    assert quantity(shm["sizeLimit"]) < quantity(limits["memory"])
    assert int(limits["nvidia.com/gpu"]) == 4


@needs_kubectl
def test_cert_manager_makes_the_secret_that_the_pods_mount():
    objects = overlay("cert-manager")
    certificate = named(objects, "Certificate", "aeheight-tls")["spec"]
    authority = named(objects, "Certificate", "aeheight-ca")["spec"]
    issuer = named(objects, "Issuer", certificate["issuerRef"]["name"])["spec"]
    assert certificate["secretName"] == "aeheight-tls"
    assert {"server auth", "client auth"} <= set(certificate["usages"])
    assert issuer == {"ca": {"secretName": authority["secretName"]}}
    assert authority["isCA"] is True
    assert named(objects, "Issuer", authority["issuerRef"]["name"])["spec"] == {"selfSigned": {}}
    hours = [int(certificate[key].removesuffix("h")) for key in ("duration", "renewBefore")]
    assert hours[0] - hours[1] > 48  # the deadline of a run
    for o in objects:
        if o["apiVersion"] == "cert-manager.io/v1":
            assert o["kind"] in {"Issuer", "Certificate"}


@needs_kubectl
def test_reduced_knows_nothing_that_came_after_1_20():
    objects = kustomize(REDUCED)
    assert not of_kind(objects, "PodDisruptionBudget")
    assert "podFailurePolicy" not in yaml.safe_dump(objects)
    assert {pod.main["image"] for pod in pods(objects)} == {"localhost/aeheight:0.1.0"}
    assert {pod.main["imagePullPolicy"] for pod in pods(objects)} == {"Never"}
    running = [pod for pod in pods(objects) if pod.owner["spec"].get("replicas", 1)]
    for resource, most in (("cpu", 4), ("memory", 12 * 2**30)):
        asked = [
            quantity(pod.main["resources"]["requests"][resource])
            * pod.owner["spec"].get("replicas", 1)
            for pod in running
        ]
        assert sum(asked) < most


# --- overlay cpu-small: an S3 server in the cluster ---------------------------------------------


@needs_kubectl
def test_cpu_small_points_everybody_at_its_s3_server():
    objects = overlay("cpu-small")
    service = named(objects, "Service", "aeheight-s3")
    port = service["spec"]["ports"][0]["port"]
    for pod in pods(objects):
        if pod.role in {"worker", "driver", "bucket"}:
            env = environment(objects, pod.main)
            assert env["AWS_ENDPOINT_URL"] == f"http://aeheight-s3:{port}"
            out = ways(objects, "Egress", pod.labels)
            inward = ways(objects, "Ingress", pod_of(objects, "aeheight-s3").labels)
            s3_labels = pod_of(objects, "aeheight-s3").labels
            assert allowed(out, s3_labels, {}, port)
            assert allowed(inward, pod.labels, {}, port)
    (region,) = [o for o in of_kind(objects, "ConfigMap") if "region.yaml" in o["data"]]
    (bucket, _) = arguments(pod_of(objects, "aeheight-bucket"))[1:]
    assert set(re.findall(r"s3://([\w-]+)/", region["data"]["region.yaml"])) == {bucket}
    assert named(objects, "Job", "aeheight-run")["spec"]["suspend"] is True
    asked = [quantity(p.main["resources"]["requests"]["memory"]) for p in pods(objects)]
    gpu = pod_of(objects, "aeheight-worker-gpu")
    assert sum(asked) - quantity(gpu.main["resources"]["requests"]["memory"]) < 11 * 2**30


@needs_kubectl
def test_the_bucket_is_made_and_may_be_there_already():
    pytest.importorskip("moto.server")
    bucket = pod_of(overlay("cpu-small"), "aeheight-bucket")
    python, *flags = bucket.main["command"]
    assert python == "python"
    with s3._moto() as url:
        for _ in range(2):
            command = [sys.executable, *flags, arguments(bucket)[0], "new-bucket", "10"]
            done = subprocess.run(
                command, env={"AWS_ENDPOINT_URL": url}, capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr
    late = [sys.executable, *flags, arguments(bucket)[0], "new-bucket", "0"]
    done = subprocess.run(
        late, env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, capture_output=True, check=False
    )
    assert (done.returncode, b"127.0.0.1:9" in done.stderr) == (1, True)


# --- overlay operator ---------------------------------------------------------------------------

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
    assert allowed(ways(objects, "Ingress", ROLES["scheduler"]), STRANGER, operator, 8787)


# --- certificates, with real processes ----------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    folder = tmp_path_factory.mktemp("tls") / "made"
    made = subprocess.run(
        [DEPLOY / "certificates", folder], capture_output=True, text=True, check=True, timeout=60
    )
    words = made.stdout.split()
    assert words[:5] == ["kubectl", "create", "secret", "generic", "aeheight-tls"]
    files = dict(word.removeprefix("--from-file=").split("=") for word in words[5:])
    assert set(files) == {"ca.crt", "tls.crt", "tls.key"}
    assert all(Path(path).is_file() for path in files.values())
    return folder


def test_the_key_is_for_its_owner_alone_and_the_authority_stays(certificates, tmp_path):
    assert (certificates / "tls.key").stat().st_mode & 0o077 == 0
    shutil.copytree(certificates, tmp_path / "again")
    subprocess.run(
        [DEPLOY / "certificates", tmp_path / "again", "30"], capture_output=True, check=True
    )
    before, after = ((f / "ca.crt").read_bytes() for f in (certificates, tmp_path / "again"))
    assert before == after
    for folder in (certificates, tmp_path / "again"):
        context = ssl.create_default_context(cafile=folder / "ca.crt")
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        checked = ["openssl", "verify", "-CAfile", certificates / "ca.crt", folder / "tls.crt"]
        assert subprocess.run(checked, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("asked", [[], ["a", "b", "c"], ["a", "0"], ["a", "-3"], ["a", "long"]])
def test_the_script_refuses_what_it_does_not_understand(tmp_path, asked):
    done = subprocess.run(
        [DEPLOY / "certificates", *asked], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


def deployed(folder: Path, port: int) -> dict[str, str]:
    """The base's shared settings, for processes here."""
    moved = {
        "/etc/aeheight-tls": str(folder),
        "aeheight-scheduler:8786": f"127.0.0.1:{port}",
        "/tmp/numba": str(folder / "numba"),
    }
    found = config(rendered(BASE), "aeheight-dask")
    for old, new in moved.items():
        found = {name: value.replace(old, new) for name, value in found.items()}
    return os.environ | found


CALL = """
import sys
from distributed import Client

with Client(sys.argv[1], timeout=10) as client:
    client.wait_for_workers(1, timeout=30)
    print(client.submit(sum, [1, 2]).result(timeout=30))
"""


@pytest.mark.slow
def test_processes_with_the_bases_settings_meet_over_tls_alone(certificates, tmp_path):
    """What the manifests tell scheduler, workers and driver, told to processes here."""
    port = s3._free_port()
    env, address = deployed(certificates, port), f"tls://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "dask"]
    base = rendered(BASE)
    scheduler = [*dask, "scheduler", "--protocol", "tls", "--port", str(port)]
    worker = [*dask, "worker", address, "--protocol", "tls", "--no-nanny", "--nthreads", "1"]
    for name, command in (("aeheight-scheduler", scheduler), ("aeheight-worker", worker)):
        told = arguments(pod_of(base, name))
        assert set(command[4:]) - {str(port), address, "1"} <= set(told)
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [
        subprocess.Popen([*command, "--no-dashboard"], env=env, **quiet)
        for command in (scheduler, worker)
    ]
    try:
        call = [sys.executable, "-c", CALL]
        done = subprocess.run(
            [*call, address], env=env, capture_output=True, text=True, check=False, timeout=90
        )
        assert done.stdout == "3\n", done.stderr
        stranger = {k: v for k, v in env.items() if "TLS__CLIENT" not in k}
        plain = address.replace("tls:", "tcp:")
        for address_of, environ in ((address, stranger), (plain, os.environ)):
            refused = subprocess.run(
                [*call, address_of], env=environ, capture_output=True, check=False, timeout=90
            )
            assert refused.returncode == 1
    finally:
        for process in running:
            process.kill()
            process.wait()


# --- memory -------------------------------------------------------------------------------------


def planned(text: str, folder: Path) -> dict[str, float]:
    """Bytes at the peak of each step, by the steps' own plans, for a region as large as life.

    Its cube is whole and empty, so that no source is needed.
    """
    path = folder / "region.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(text) | {"store": str(folder / "run")}))
    run = Run(load_region(path))
    asked = run.settings.grid
    west, south, east, north = asked.bounds
    shape = (round((north - south) / asked.resolution), round((east - west) / asked.resolution))
    grid = Grid(asked.crs, float(asked.resolution), west, north, shape)
    ground = Ground(grid, None, EmbeddingSource(()), None, None)
    made = ingest.template(run.settings, Sources((ground,)))
    tree = create(run.cube, made)
    ledger = run.ledger("cube").begin(
        cube_settings(run.settings) | {"cube_identity": tree.identity}
    )
    ledger.store.write(ingest.ASKED, json.dumps(ingest.sources_asked(run.settings)).encode())
    shards = ingest.cube_shards(made)
    pretend(run.ledger("cube"), shards)
    run.model.write("best.ckpt", checkpoint_of(UNET, "ridge", wild_weights()).to_bytes())
    largest = max(ingest._raw(made, shard) for shard in shards)
    return {
        "ingest": ingest._BASE_BYTES + ingest._TASK_SHARE * largest,
        "train": train.plan(run).facts["peak_bytes"],
        "predict": predict._Work.of(run).worker_bytes,
        "evaluate": evaluate.plan(run).facts["peak_worker_bytes"],
    }


@pytest.mark.parametrize("name", ["base", "cpu-small"] if KUBECTL else ["base"])
def test_memory_suffices_for_what_the_plans_foresee(name, tmp_path):
    objects = rendered(RENDERED[name])
    (region,) = [o for o in of_kind(objects, "ConfigMap") if "region.yaml" in o["data"]]
    peaks = planned(region["data"]["region.yaml"], tmp_path)
    driver, worker = (
        quantity(pod_of(objects, name).main["resources"]["limits"]["memory"])
        for name in ("aeheight-run", "aeheight-worker")
    )
    assert peaks.pop("train") < driver
    assert max(peaks.values()) < worker
    assert min(peaks.values()) > 2**28
