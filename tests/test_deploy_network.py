"""deploy/: who may speak with whom: policies by their rules, certificates by real processes."""

import os
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests import s3
from tests.manifests import BASE, DEPLOY, ROLES, allowed, arguments, config, pod_of, rendered, ways

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
    assert words[-4:] == ["kubectl", "apply", "-f", "-"]  # it may be there already
    named = [word.split("=") for word in words if word.startswith("--from-file=")]
    files = {name: path for _, name, path in named}
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
        "/etc/aeheight-dask": str(folder / "dask"),
        "aeheight-scheduler:8786": f"127.0.0.1:{port}",
        "/tmp/numba": str(folder / "numba"),
    }
    (folder / "dask").mkdir()
    shutil.copy(BASE / "logging.yaml", folder / "dask")
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
        elsewhere = {"TLS__CLIENT__CERT": "tls.crt", "TLS__CLIENT__KEY": "tls.key"}
        subprocess.run([DEPLOY / "certificates", tmp_path], capture_output=True, check=True)
        stranger = {f"DASK_DISTRIBUTED__COMM__{k}": f"{tmp_path}/{v}" for k, v in elsewhere.items()}
        plain = address.replace("tls:", "tcp:")
        # The other side hangs up; which of the two words of it comes first is chance.
        closed = "SSL|reset|pipe|closed|connect"
        for where, changed in ((address, stranger), (plain, {})):
            encrypted = {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": str(bool(changed))}
            refused = subprocess.run(
                [*call, where], env=env | changed | encrypted, capture_output=True, check=False,
                timeout=90,
            )  # fmt: skip
            assert refused.returncode == 1
            assert not refused.stdout
            assert re.search(closed, refused.stderr.decode())
    finally:
        for process in running:
            process.kill()
            process.wait()
