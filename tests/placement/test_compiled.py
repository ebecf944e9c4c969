"""The cache of compiled functions follows every source that they may call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from placement.compile_cache import compiled_sources

ROOT = Path(__file__).parents[2]

CALLEE = """
from placement.compiled import compiled
from placement.constants import STEP

@compiled()
def callee(x):
    return x + STEP
"""
CALLER = """
from placement.callee import callee
from placement.compiled import compiled

@compiled()
def caller(x):
    return 10 * callee(x)
"""


def call(root: Path) -> tuple[int, bool]:
    """(caller(1), whether it came out of the cache), in a process of its own."""
    code = "from placement.caller import caller\nprint(caller(1), int(sum(caller.stats.cache_hits.values()) > 0))"
    environment = {**os.environ, "PYTHONPATH": str(root), "EXPERTMESH_CACHE": str(root / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    value, cached = done.stdout.split()
    return int(value), cached == "1"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "placement"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "constants.py").write_text("STEP = 1\n")
    (folder / "callee.py").write_text(CALLEE)
    (folder / "caller.py").write_text(CALLER)
    for name in ("compiled.py", "compile_cache.py"):
        shutil.copy(ROOT / "placement" / name, folder)
    return folder


def test_a_change_in_another_file_is_compiled_anew(package):
    """A callee changes, then a constant, neither in size; the caller stays. Numba itself would see no difference."""
    assert call(package.parent) == (20, False)
    assert call(package.parent) == (20, True)
    changes = [("callee.py", "x + STEP", "x - STEP", 0), ("constants.py", "STEP = 1", "STEP = 4", -30)]
    for file, old, new, expected in changes:
        source = package / file
        source.write_text(source.read_text().replace(old, new))
        assert call(package.parent) == (expected, False)
    assert call(package.parent) == (-30, True)


def test_planning_is_not_compiled_anew_for_a_change_in_the_data_plane():
    planner, data_plane = (compiled_sources(ROOT, name) for name in ("placement", "experts"))
    assert planner
    assert set(planner) < set(data_plane)
    assert {path.relative_to(ROOT).parts[0] for path in planner} == {"placement"}


def test_every_cached_function_of_numba_is_cached_by_content():
    own = [path for room in ("placement", "experts", "cluster") for path in (ROOT / room).rglob("*.py")]
    wrong = [str(path) for path in own if "cache=True" in path.read_text() and path.name != "compiled.py"]
    assert wrong == []


def test_the_planner_is_compiled_once_for_each_version(tmp_path: Path) -> None:
    """The first call on a machine compiles and says so; the next process finds that it was done."""
    code = (
        "from placement import precompile\n"
        "precompile.compile_all = lambda: print('compiled')\n"
        "print(precompile.ensure_compiled(lambda line: print('said')) > 0)"
    )
    environment = {**os.environ, "EXPERTMESH_CACHE": str(tmp_path)}

    def run() -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run() == ["said", "compiled", "True"]
    assert run() == ["False"]
