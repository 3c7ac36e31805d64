"""deploy/: what must hold for everything that may be applied, known without a cluster."""

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import dask
import distributed
import kubernetes_validate
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker
from kubernetes_validate.utils import all_versions

from aeheight import retire
from aeheight.cli import build_parser
from aeheight.settings import load_region
from tests.manifests import (
    BASE,
    DEPLOY,
    KUBECTL,
    RENDERED,
    ROOT,
    Object,
    config,
    environment,
    names,
    of_kind,
    pod_of,
    pods,
    quantity,
    rendered,
)

ADDRESS = "tls://aeheight-scheduler:8786"
# Older schemas wrongly want onPodConditions in every rule of a podFailurePolicy.
OLDEST = (1, 29)
VERSIONS = sorted({(int(v.split(".")[0]), int(v.split(".")[1])) for v in all_versions()})
SUPPORTED = [f"{major}.{minor}" for major, minor in VERSIONS if (major, minor) >= OLDEST]
OTHERS = {"cert-manager.io/v1", "kubernetes.dask.org/v1"}
"""What is no part of Kubernetes: see test_deploy_overlays.py."""
FOLDERS = list(RENDERED) if KUBECTL else ["base"]


@pytest.fixture(scope="module", params=FOLDERS)
def objects(request) -> list[Object]:
    """What `kubectl apply -k` would send."""
    return rendered(RENDERED[request.param])


@pytest.fixture(scope="module")
def base() -> list[Object]:
    return rendered(BASE)


# --- schemas and lint ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_object_validates_strictly(version):
    every = [o for folder in FOLDERS for o in rendered(RENDERED[folder])]
    once = {json.dumps(o, sort_keys=True): o for o in every if o["apiVersion"] not in OTHERS}
    assert len(once) > 15
    for o in once.values():
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
def test_the_validator_refuses_what_is_wrong(base, path, value):
    (job,) = copy.deepcopy(of_kind(base, "Job"))
    *parents, last = path
    target = job
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, SUPPORTED[-1], strict=True)


def test_yamllint_passes():
    places = ["deploy", "tests/kube"]
    lint = [sys.executable, "-m", "yamllint", "--strict", "--config-file", ".yamllint", *places]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_says_what_it_is():
    for path in DEPLOY.rglob("*.yaml"):
        assert path.read_text().startswith("#"), path


# --- the objects fit each other -----------------------------------------------------------------


def selectors(objects: list[Object]) -> Iterator[dict[str, str]]:
    for o in of_kind(objects, "Deployment"):
        yield o["spec"]["selector"]["matchLabels"]
    for o in of_kind(objects, "Service"):
        yield o["spec"]["selector"]
    for o in of_kind(objects, "DaskCluster"):
        yield o["spec"]["scheduler"]["service"]["selector"]


def test_selectors_find_their_pods(objects):
    labels = [pod.labels for pod in pods(objects)]
    for selector in selectors(objects):
        assert sum(selector.items() <= each.items() for each in labels) == 1, selector


def test_every_object_says_what_it_belongs_to(objects):
    for o in objects:
        assert o["metadata"]["labels"]["app.kubernetes.io/name"] == "aeheight"
    for pod in pods(objects):
        assert pod.labels["app.kubernetes.io/name"] == "aeheight"
        assert pod.role in {"scheduler", "worker", "driver", "s3", "bucket"}


def test_named_ports_exist(objects):
    for pod in pods(objects):
        ports = {port["name"] for port in pod.main.get("ports", [])}
        probes = [pod.main[p] for p in pod.main if p.endswith("Probe")]
        wanted = {(p.get("httpGet") or p["tcpSocket"])["port"] for p in probes}
        assert wanted <= ports
        assert bool(probes) is (pod.owner["kind"] != "Job")


def test_volumes_config_and_account_exist(objects):
    for pod in pods(objects):
        assert pod.spec["serviceAccountName"] in names(objects, "ServiceAccount")
        volumes = {v["name"]: v for v in pod.spec["volumes"]}
        assert {m["name"] for m in pod.main["volumeMounts"]} == set(volumes)
        maps = {v["configMap"]["name"] for v in volumes.values() if "configMap" in v}
        maps |= {
            f["configMapRef"]["name"] for f in pod.main.get("envFrom", []) if "configMapRef" in f
        }
        assert maps <= names(objects, "ConfigMap")
        if "priorityClassName" in pod.spec:
            assert pod.spec["priorityClassName"] in names(objects, "PriorityClass")


def test_each_role_has_its_own_identity(objects):
    for pod in pods(objects):
        if pod.role in {"scheduler", "worker", "driver"}:
            assert pod.spec["serviceAccountName"] == f"aeheight-{pod.role}"


# --- the commands are real ----------------------------------------------------------------------


def mounted_files(objects: list[Object], pod) -> set[str]:
    """Paths of the ConfigMaps' files as the pod's container sees them."""
    mounts = {m["name"]: m["mountPath"] for m in pod.main["volumeMounts"]}
    return {
        f"{mounts[volume['name']]}/{key}"
        for volume in pod.spec["volumes"]
        if "configMap" in volume
        for key in config(objects, volume["configMap"]["name"])
    }


def drivers(objects: list[Object]) -> list:
    return [pod for pod in pods(objects) if pod.role == "driver"]


def test_the_jobs_commands_parse_and_find_their_file_and_scheduler(objects):
    assert drivers(objects)
    for pod in drivers(objects):
        assert pod.owner["kind"] == "Job"
        assert "command" not in pod.main, "the image's entry point is aeheight"
        parsed = build_parser().parse_args(pod.main["args"])
        assert parsed.region in mounted_files(objects, pod)
        assert parsed.scheduler == (None if parsed.verb == "train" else ADDRESS)
        ports = {port["name"]: port["containerPort"] for port in pod.main["ports"]}
        assert parsed.metrics_port == ports["metrics"]
        assert parsed.as_json


def test_the_overrides_fit_the_region(objects, tmp_path):
    for pod in drivers(objects):
        parsed = build_parser().parse_args(pod.main["args"])
        (tmp_path / "region.yaml").write_text(region_of(objects))
        load_region(tmp_path / "region.yaml", parsed.overrides)


def test_the_dask_commands_parse(objects):
    clis = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
    deployed = [pod for pod in pods(objects) if pod.main.get("command", [None])[0] == "dask"]
    assert {pod.role for pod in deployed} in ({"scheduler", "worker"}, set())
    for pod in deployed:
        command, args = pod.main["command"], list(pod.main["args"])
        assert command[1] == pod.role
        options = clis[pod.role].make_context(shlex.join(command), list(args)).params
        assert options["protocol"] == "tls"
        ports = {port["name"]: port["containerPort"] for port in pod.main["ports"]}
        assert options["dashboard_address"] == f":{ports['http']}"
        port = options["worker_port" if pod.role == "worker" else "port"]
        assert int(port) == ports["comm"]
        known = set(environment(objects, pod.main))
        known |= {"DASK_WORKER_NAME"} if pod.owner["kind"] == "DaskCluster" else set()
        assert set(re.findall(r"\$\((\w+)\)", " ".join(args))) <= known


def test_workers_retire_before_they_are_stopped(objects, monkeypatch):
    seen = []
    monkeypatch.setattr(retire, "retire", lambda *asked: seen.append(asked) or "done")
    for pod in (pod for pod in pods(objects) if pod.role == "worker"):
        known = environment(objects, pod.main)
        command = pod.main["lifecycle"]["preStop"]["exec"]["command"]
        if command[:2] == ["sh", "-c"]:
            command = shlex.split(command[2].replace("$DASK_WORKER_NAME", "w"))
        assert command[:3] == ["python", "-m", "aeheight.retire"]
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", known["DASK_SCHEDULER_ADDRESS"])
        monkeypatch.setenv("POD_NAME", "w") if "POD_NAME" in known else None
        assert retire.main(command[3:]) == 0
        address, name, patience = seen.pop()
        assert (address, name) == (ADDRESS, "w")
        assert patience + 10 <= pod.spec["terminationGracePeriodSeconds"]


def test_dask_knows_every_setting(objects):
    """A misspelt DASK_ variable is ignored without a word."""
    assert distributed.__version__  # importing it is what declares its settings
    settings = {name for pod in pods(objects) for name in environment(objects, pod.main)}
    settings = {name for name in settings if name.startswith("DASK_")}
    for name in settings - {"DASK_CONFIG", "DASK_SCHEDULER_ADDRESS"}:
        key = name.removeprefix("DASK_").lower().replace("__", ".")
        assert dask.config.get(key, default=KeyError) is not KeyError, f"Dask has no {key}"


def test_dask_finds_its_settings_file(objects):
    for pod in pods(objects):
        if pod.role in {"scheduler", "worker", "driver"}:
            place = environment(objects, pod.main)["DASK_CONFIG"]
            assert f"{place}/logging.yaml" in mounted_files(objects, pod)


def region_of(objects: list[Object]) -> str:
    (region,) = [o for o in of_kind(objects, "ConfigMap") if "region.yaml" in o["data"]]
    text: str = region["data"]["region.yaml"]
    return text


def test_the_region_loads_and_lies_in_an_object_store(objects, tmp_path):
    (tmp_path / "region.yaml").write_text(region_of(objects))
    settings = load_region(tmp_path / "region.yaml")
    hrefs = [s.href for s in (settings.embeddings, settings.height, settings.prior) if s]
    assert settings.store.startswith("s3://")
    assert all(isinstance(h, str) and h.startswith("s3://") for h in hrefs), "pods share no disk"


def test_threads_are_fixed_alike_on_workers_and_driver(objects):
    """Law 5: the last bits of a result depend on the thread count."""
    counts = set()
    for pod in pods(objects):
        if pod.role in {"worker", "driver"}:
            env = environment(objects, pod.main)
            counts |= {env[f"{library}_NUM_THREADS"] for library in ("OMP", "OPENBLAS", "MKL")}
            assert quantity(pod.main["resources"]["limits"]["cpu"]) >= int(max(counts))
    assert len(counts) == 1


# --- mutual TLS ---------------------------------------------------------------------------------


def test_everything_that_speaks_dask_does_so_encrypted(objects):
    for pod in pods(objects):
        env = environment(objects, pod.main)
        if not pod.ours or "aeheight-tls" not in yaml.safe_dump(pod.spec):
            assert not any("scheduler:8786" in word for word in pod.main.get("args", []))
            continue
        (volume,) = [v["secret"] for v in pod.spec["volumes"] if "secret" in v]
        made = bool(of_kind(objects, "Certificate"))  # cert-manager's come, and are waited for
        assert volume == {"secretName": "aeheight-tls", "optional": not made, "defaultMode": 0o440}
        assert pod.spec["securityContext"]["fsGroup"] == 10001
        (mount,) = [m for m in pod.main["volumeMounts"] if m["name"] == "tls"]
        assert env["DASK_SCHEDULER_ADDRESS"] == ADDRESS
        assert env["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "True"
        files = {value for name, value in env.items() if "COMM__TLS" in name}
        assert files == {f"{mount['mountPath']}/{n}" for n in ("ca.crt", "tls.crt", "tls.key")}
    assert "tcp://" not in yaml.safe_dump(objects)


# --- rights, secrets, bounds --------------------------------------------------------------------


def test_pods_meet_the_restricted_standard(objects):
    for pod in pods(objects):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] >= 1000
        assert context["runAsGroup"] >= 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod.spec)
        assert all({"emptyDir", "configMap", "secret"} & set(v) for v in pod.spec["volumes"])
        assert pod.main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"} & {
        o["kind"] for o in objects
    }


def test_tmp_and_home_are_writable_and_bounded(objects):
    for pod in pods(objects):
        empty = {v["name"]: v["emptyDir"] for v in pod.spec["volumes"] if "emptyDir" in v}
        disk = [v["sizeLimit"] for v in empty.values() if v.get("medium") != "Memory"]
        assert all(volume["sizeLimit"] for volume in empty.values())
        paths = {m["mountPath"] for m in pod.main["volumeMounts"] if m["name"] in empty}
        assert {"/tmp"} <= paths
        assert "/home/aeheight" in paths or pod.role in {"s3", "bucket"}
        limits = pod.main["resources"]["limits"]
        assert sum(map(quantity, disk)) < quantity(limits["ephemeral-storage"])
        if numba := environment(objects, pod.main).get("NUMBA_CACHE_DIR"):
            assert numba.startswith("/tmp/")


def test_nothing_waits_or_grows_for_ever(objects):
    for job in of_kind(objects, "Job"):
        spec = job["spec"]
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["ttlSecondsAfterFinished"] > 0
        assert 0 < spec["backoffLimit"] <= 6
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
    for o in of_kind(objects, "Deployment"):
        assert o["spec"]["progressDeadlineSeconds"] <= 900
    for pod in pods(objects):
        assert pod.main["terminationMessagePolicy"] == "FallbackToLogsOnError"
        for resource in ("cpu", "memory", "ephemeral-storage"):
            assert pod.main["resources"]["requests"][resource]
            assert pod.main["resources"]["limits"][resource]


def test_memory_is_promised_whole(objects, request):
    if "reduced" in request.node.name:
        pytest.skip("a small node for tests")
    for pod in pods(objects):
        requests, limits = (pod.main["resources"][kind] for kind in ("requests", "limits"))
        assert requests["memory"] == limits["memory"]
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


def test_a_gpu_is_asked_for_only_where_somebody_wants_one(objects, request):
    """A pod that waits for a GPU that never comes waits for ever."""
    asking = {
        pod.owner["metadata"]["name"]
        for pod in pods(objects)
        if "nvidia.com/gpu" in pod.main["resources"]["limits"]
        and pod.owner["spec"].get("replicas", 1)
    }
    wanted = {
        "gpu": {"aeheight-worker-gpu", "aeheight-run"},
        "training": {"aeheight-train"},
    }
    assert asking == wanted.get(request.node.callspec.params["objects"], set())


def test_bad_input_ends_the_job_and_a_drained_node_does_not(objects, request):
    for pod in drivers(objects):
        if request.node.callspec.params["objects"] == "reduced":  # for an API that knows none
            assert "podFailurePolicy" not in pod.owner["spec"]
            continue
        refused, drained = pod.owner["spec"]["podFailurePolicy"]["rules"]
        assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [2])
        assert refused["onExitCodes"]["containerName"] == pod.main["name"] == "aeheight"
        assert drained["action"] == "Ignore"


def test_credentials_come_from_a_secret(objects):
    assert not of_kind(objects, "Secret")
    for pod in pods(objects):
        secrets = [f["secretRef"] for f in pod.main.get("envFrom", []) if "secretRef" in f]
        wanted = pod.role in {"worker", "driver"}
        assert secrets == [{"name": "aeheight-store", "optional": True}] * wanted


def secret_lines(text: str) -> Iterator[str]:
    """Lines that look as if they held a credential."""
    pattern = (
        r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|"
        r"(?!secretName)(?<!\w)\w*(?i:secret|password|token)\w*[=:] *['\"]?\w{8}"
    )
    return (line for line in text.splitlines() if re.search(pattern, line))


@pytest.mark.parametrize(
    "line", ["AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI", "password: 'hunter2hunter2'", "AKIA" + "A" * 16]
)
def test_a_leaked_secret_would_be_seen(line):
    assert list(secret_lines(line)) == [line]
    assert not list(secret_lines("secretName: aeheight-tls"))


def test_no_file_holds_a_secret():
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    assert len(files) > 25
    for path in files:
        assert not list(secret_lines(path.read_text())), path


def test_no_variable_holds_a_secret(objects):
    for pod in pods(objects):
        for name in environment(objects, pod.main):
            public = name.endswith("__KEY")  # a path
            assert public or not re.search("KEY|SECRET|TOKEN|PASSWORD", name)


def test_a_lost_pod_of_the_scheduler_or_driver_costs_most(base):
    for name in ("aeheight-scheduler", "aeheight-run"):
        assert pod_of(base, name).spec["priorityClassName"] == "aeheight-control"
