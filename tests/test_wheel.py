"""The wheel holds every file of the three rooms, and works without the checkout beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "experts", "placement")
MADE_BY_RUNNING = ("__pycache__", "*.pyc", "*.nbi", "*.nbc")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from: setuptools leaves its own folders beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "serve_app.py"):
        shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns(*MADE_BY_RUNNING))
    return copy


@pytest.fixture(scope="module")
def sources(checkout: Path) -> dict[str, bytes]:
    """What the wheel has to hold, by path; read before the build adds files of its own."""
    files = [checkout / "serve_app.py", *(path for room in ROOMS for path in (checkout / room).rglob("*"))]
    return {path.relative_to(checkout).as_posix(): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def wheel(checkout: Path, sources: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("expertmesh-*.whl")
    return path


def test_the_wheel_holds_every_source_and_nothing_else(wheel: Path, sources: dict[str, bytes]) -> None:
    with ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert "experts/kernels/native/native_mlp.cpp" in sources  # C++ counts as a source
    assert sorted(packed) == sorted(sources)
    assert packed == sources


def test_the_command_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ZipFile(wheel) as archive:
        archive.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for command, shown in (
        (("-m", "cluster.command", "placement", "--help"), "optimize"),
        (("-c", "import placement.command.app as app; print(app.__file__)"), str(installed)),
        (("-m", "cluster.command", "serve", "--help"), "--port"),
        (("-m", "cluster.command", "version"), str(installed)),
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


def test_the_wheel_has_the_command_and_no_benchmarks(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        [scripts] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt")]
        archive.extractall(tmp_path)
    assert scripts.split() == ["[console_scripts]", "expertmesh", "=", "cluster.command.main:main"]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.command", "bench", "--list"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: there are no benchmarks in {tmp_path}: ")
    assert done.stderr.count("\n") == 1
