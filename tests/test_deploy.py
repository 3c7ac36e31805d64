"""deploy/: what can be known about the image and the manifests without a cluster."""

import copy
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import kubernetes_validate
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker
from kubernetes_validate.utils import all_versions

from aeheight.cli import build_parser
from aeheight.settings import load_region

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "base"
DOCKERFILE = DEPLOY / "image" / "Dockerfile"
STORE_SECRET = "aeheight-store"
# Older schemas wrongly want onPodConditions in every rule of a podFailurePolicy.
OLDEST = (1, 29)
VERSIONS = sorted({(int(v.split(".")[0]), int(v.split(".")[1])) for v in all_versions()})
SUPPORTED = [f"{major}.{minor}" for major, minor in VERSIONS if (major, minor) >= OLDEST]

Object = dict[str, Any]


# --- what kustomize makes of the base -----------------------------------------------------------


def assemble(folder: Path) -> list[Object]:
    """The objects of a kustomization, for the three features that ours uses; no name hashes."""
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


def containers(objects: list[Object]) -> list[Object]:
    return [c for _, pod in pods(objects) for c in pod["containers"]]


def pods(objects: list[Object]) -> list[tuple[Object, Object]]:
    """Every workload with the spec of its pods."""
    workloads = [o for o in objects if "template" in o.get("spec", {})]
    return [(o, o["spec"]["template"]["spec"]) for o in workloads]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [o for o in objects if o["kind"] == kind]


def names(objects: list[Object], kind: str) -> set[str]:
    return {o["metadata"]["name"] for o in of_kind(objects, kind)}


def without_hash(objects: list[Object]) -> list[Object]:
    """Generated names as they were before kustomize added the hash of their content."""
    plain = re.sub(r"(aeheight-region)-[0-9a-z]{10}\b", r"\1", yaml.safe_dump(objects))
    return sorted(yaml.safe_load(plain), key=lambda o: (o["kind"], o["metadata"]["name"]))


def kustomize(folder: Path) -> list[Object]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return list(yaml.safe_load_all(done.stdout))


needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    """What `kubectl apply -k` would send; without a kubectl the same, but for the name hashes."""
    return kustomize(BASE) if shutil.which("kubectl") else assemble(BASE)


@needs_kubectl
def test_the_small_loader_equals_kustomize():
    assert without_hash(assemble(BASE)) == without_hash(kustomize(BASE))


@needs_kubectl
def test_a_changed_region_changes_the_name_that_the_job_mounts(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    region = tmp_path / "base" / "region.yaml"
    region.write_text(region.read_text().replace("year: 2021", "year: 2022"))
    before, after = (
        names(kustomize(BASE), "ConfigMap"),
        names(kustomize(region.parent), "ConfigMap"),
    )
    assert before.isdisjoint(after)


# --- schemas and lint ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_object_validates_strictly(objects, version):
    for o in objects:
        kubernetes_validate.validate(o, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "automountServiceAcountToken"), False),
        (("spec", "backofLimit"), 4),
        (("spec", "template", "spec", "containers", 0, "args"), "run region.yaml"),
        (("spec", "template", "spec", "containers", 0, "ports"), [{"containerPort": "http"}]),
    ],
)
def test_the_validator_refuses_what_is_wrong(objects, path, value):
    (job,) = copy.deepcopy(of_kind(objects, "Job"))
    *parents, last = path
    target = job
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, SUPPORTED[-1], strict=True)


def test_yamllint_passes():
    lint = [sys.executable, "-m", "yamllint", "--strict", "--config-file", ".yamllint", "deploy"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the objects fit each other -----------------------------------------------------------------


def test_selectors_find_their_pods(objects):
    templates = [o["spec"]["template"]["metadata"]["labels"] for o, _ in pods(objects)]
    selectors = [o["spec"]["selector"]["matchLabels"] for o in of_kind(objects, "Deployment")]
    selectors += [o["spec"]["selector"] for o in of_kind(objects, "Service")]
    assert len(selectors) == 3
    for selector in selectors:
        assert sum(selector.items() <= labels.items() for labels in templates) == 1


def test_every_object_says_what_it_belongs_to(objects):
    for o in objects:
        assert o["metadata"]["labels"]["app.kubernetes.io/name"] == "aeheight"


def test_named_ports_exist(objects):
    for container in containers(objects):
        ports = {port["name"] for port in container.get("ports", [])}
        probes = [container[p] for p in container if p.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports
    (service,) = of_kind(objects, "Service")
    (scheduler,) = [c for c in containers(objects) if c["name"] == "scheduler"]
    declared = {port["name"]: port["containerPort"] for port in scheduler["ports"]}
    assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == declared


def test_volumes_config_and_account_exist(objects):
    for _, pod in pods(objects):
        assert pod["serviceAccountName"] in names(objects, "ServiceAccount")
        volumes = {v["name"]: v for v in pod["volumes"]}
        for container in pod["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
        maps = {v["configMap"]["name"] for v in volumes.values() if "configMap" in v}
        assert maps <= names(objects, "ConfigMap")


# --- the commands are real ----------------------------------------------------------------------


def mounted_files(objects: list[Object], pod: Object) -> set[str]:
    """Paths of the ConfigMaps' files as the pod's first container sees them."""
    data = {o["metadata"]["name"]: o["data"] for o in of_kind(objects, "ConfigMap")}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    return {
        f"{mounts[volume['name']]}/{key}"
        for volume in pod["volumes"]
        if "configMap" in volume
        for key in data[volume["configMap"]["name"]]
    }


def test_the_jobs_commands_parse_and_find_their_file_and_scheduler(objects):
    (service,) = of_kind(objects, "Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    address = f"tcp://{service['metadata']['name']}:{ports['comm']}"
    jobs = [(o, pod) for o, pod in pods(objects) if o["kind"] == "Job"]
    assert jobs
    for _, pod in jobs:
        (container,) = pod["containers"]
        assert "command" not in container, "the image's entry point is aeheight"
        parsed = vars(build_parser().parse_args(container["args"]))
        assert address in parsed.values()
        assert mounted_files(objects, pod) & {str(value) for value in parsed.values()}


def test_the_dask_commands_parse(objects):
    clis = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
    deployed = [c for c in containers(objects) if c.get("command", [None])[0] == "dask"]
    assert {c["command"][1] for c in deployed} == set(clis)
    for container in deployed:
        cli = clis[container["command"][1]]
        cli.make_context(shlex.join(container["command"]), list(container["args"]))
        defined = {variable["name"] for variable in container["env"]}
        assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= defined


def test_dask_knows_every_setting(objects):
    """A misspelt DASK_ variable is ignored without a word."""
    assert distributed.__version__  # importing it is what declares its settings
    settings = [
        variable["name"]
        for container in containers(objects)
        for variable in container.get("env", [])
        if variable["name"].startswith("DASK_")
    ]
    assert settings
    for name in settings:
        key = name.removeprefix("DASK_").lower().replace("__", ".")
        assert dask.config.get(key, default=KeyError) is not KeyError, f"Dask has no {key}"


def test_the_region_loads_and_lies_in_an_object_store(objects, tmp_path):
    (region,) = of_kind(objects, "ConfigMap")
    (name,) = region["data"]
    (tmp_path / name).write_text(region["data"][name])
    settings = load_region(tmp_path / name)
    hrefs = [settings.embeddings.href, settings.height.href if settings.height else ""]
    assert settings.store.startswith("s3://")
    assert all(isinstance(h, str) and h.startswith("s3://") for h in hrefs), "pods share no disk"


def test_threads_are_fixed_alike_on_worker_and_driver(objects):
    """Law 5: the last bits of a result depend on the thread count."""
    counts = set()
    for container in containers(objects):
        if container["name"] == "scheduler":
            continue
        env = {v["name"]: v.get("value") for v in container["env"]}
        counts |= {env[f"{library}_NUM_THREADS"] for library in ("OMP", "OPENBLAS", "MKL")}
        counts.add(container["resources"]["limits"]["cpu"])
    assert len(counts) == 1


# --- rights, secrets, bounds --------------------------------------------------------------------


def test_pods_meet_the_restricted_standard(objects):
    for _, pod in pods(objects):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] >= 1000
        assert context["runAsGroup"] >= 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all({"emptyDir", "configMap"} & set(volume) for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    (account,) = of_kind(objects, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_tmp_and_home_are_writable_and_bounded(objects):
    for _, pod in pods(objects):
        empty = {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v}
        assert all(volume["sizeLimit"] for volume in empty.values())
        for container in pod["containers"]:
            paths = {m["mountPath"] for m in container["volumeMounts"] if m["name"] in empty}
            assert {"/tmp", "/home/aeheight"} <= paths


def test_nothing_waits_or_grows_for_ever(objects):
    for job in of_kind(objects, "Job"):
        spec = job["spec"]
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["ttlSecondsAfterFinished"] > 0
        assert 0 < spec["backoffLimit"] <= 6
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
    for container in containers(objects):
        for resource in ("cpu", "memory", "ephemeral-storage"):
            assert container["resources"]["requests"][resource]
            assert container["resources"]["limits"][resource]


def test_credentials_come_from_a_secret_that_must_exist(objects):
    assert not of_kind(objects, "Secret")
    holders = [c for c in containers(objects) if "envFrom" in c]
    assert {c["name"] for c in holders} == {"aeheight", "worker"}
    for container in holders:
        assert container["envFrom"] == [{"secretRef": {"name": STORE_SECRET, "optional": False}}]


def secret_lines(text: str) -> Iterator[str]:
    """Lines that look as if they held a credential."""
    pattern = (
        r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(?i:secret|password|token)\w*[=:] *['\"]?\w{8}"
    )
    return (line for line in text.splitlines() if re.search(pattern, line))


@pytest.mark.parametrize(
    "line", ["AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI", "password: 'hunter2hunter2'", "AKIA" + "A" * 16]
)
def test_a_leaked_secret_would_be_seen(line):
    assert list(secret_lines(line)) == [line]


def test_no_file_holds_a_secret(objects):
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert not list(secret_lines(path.read_text())), path
    for container in containers(objects):
        for variable in container["env"]:
            assert not re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"])


# --- the image ----------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), line continuations joined, no comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def copied_from_the_tree() -> list[str]:
    copies = [rest.split() for word, rest in instructions() if word == "COPY"]
    return [source for words in copies if "--from" not in words[0] for source in words[:-1]]


def test_what_the_image_copies_exists_and_is_not_ignored():
    ignore = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    sources = copied_from_the_tree()
    assert kept == set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source


def test_the_final_stage_is_small_and_not_root(objects):
    stages = [i for i, (word, _) in enumerate(instructions()) if word == "FROM"]
    final = instructions()[stages[-1] :]
    users = [rest for word, rest in final if word == "USER"]
    ids = {
        (p["securityContext"]["runAsUser"], p["securityContext"]["runAsGroup"])
        for _, p in pods(objects)
    }
    assert users == [f"{user}:{group}" for user, group in ids]
    assert any("useradd" in rest and "--uid 10001" in rest for _, rest in final)
    assert not re.search(r"\b(gcc|g\+\+|build-essential|cmake)\b", DOCKERFILE.read_text())


def test_the_image_and_the_package_agree(objects):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = [rest for word, rest in instructions() if word == "ENTRYPOINT"]
    extras = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE.read_text())
    assert entry == ['["aeheight"]']
    assert "aeheight" in project["scripts"]
    assert extras
    assert set(extras[0].split(",")) <= set(project["optional-dependencies"])
    tags = {container["image"].rpartition(":")[2] for container in containers(objects)}
    assert tags == {project["version"]}
