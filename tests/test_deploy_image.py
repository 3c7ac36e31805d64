"""deploy/image: what can be known about the image without building it."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.manifests import BASE, DEPLOY, KUBECTL, RENDERED, ROOT, pods, rendered

DOCKERFILE = DEPLOY / "image" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here: it has no build for this machine")
def test_hadolint_passes():
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_the_final_stage_is_small_and_not_root():
    stages = [i for i, (word, _) in enumerate(instructions()) if word == "FROM"]
    final = instructions()[stages[-1] :]
    users = [rest for word, rest in final if word == "USER"]
    ids = {
        (p.spec["securityContext"]["runAsUser"], p.spec["securityContext"]["runAsGroup"])
        for p in pods(rendered(BASE))
    }
    assert users == [f"{user}:{group}" for user, group in ids]
    assert any("useradd" in rest and "--uid 10001" in rest for _, rest in final)
    assert not re.search(r"\b(gcc|g\+\+|build-essential|cmake)\b", DOCKERFILE.read_text())


def test_the_image_and_the_package_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = [rest for word, rest in instructions() if word == "ENTRYPOINT"]
    extras = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE.read_text())
    assert entry == ['["aeheight"]']
    assert "aeheight" in project["scripts"]
    assert extras
    assert set(extras[0].split(",")) <= set(project["optional-dependencies"])
    folders = RENDERED.values() if KUBECTL else [BASE]
    images = {pod.main["image"] for f in folders for pod in pods(rendered(f)) if pod.ours}
    assert {image.rpartition(":")[2] for image in images} == {project["version"]}
