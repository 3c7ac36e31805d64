"""deploy/: what each overlay and component is for, and memory enough for the example."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
    REDUCED,
    RENDERED,
    Object,
    allowed,
    arguments,
    assemble,
    config,
    environment,
    kustomize,
    named,
    names,
    needs_kubectl,
    of_kind,
    overlay,
    pod_of,
    pods,
    quantity,
    rendered,
    ways,
)

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
    keys = {t["key"] for t in gpu.spec["tolerations"] if "node.kubernetes.io" not in t["key"]}
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
    *usual, device = gpu.spec["tolerations"]
    assert device["key"] == "nvidia.com/gpu"
    gpu.spec["tolerations"] = usual
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
