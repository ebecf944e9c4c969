"""What the design says of the source: imports run one way, vllm and ray stay in their rooms, files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["placement", "experts", "cluster", "serve_app"]  # each may import those before it
MAX_LINES = 350
SOURCES = sorted(
    path
    for room in (*ROOMS, "benchmarks", "examples", "tests")
    for path in ([ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py"))
)


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(top-level package, line) of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield str(node.module).partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (
                (str(a.value).partition(".")[0], node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant)
            )


def sources_of(room: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] in (room, f"{room}.py")]


def violations(room: str, forbidden: set[str], *, but_where: str = "\0") -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {package}"
        for path in sources_of(room)
        if but_where not in path.name
        for package, line in imports_of(path)
        if package in forbidden
    ]


def test_every_room_has_sources() -> None:
    assert all(sources_of(room) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    assert violations(room, {*ROOMS[ROOMS.index(room) + 1 :], "benchmarks", "tests", "examples"}) == []


def test_planning_needs_no_framework() -> None:
    assert violations("placement", {"ray", "vllm", "torch"}) == []


def test_the_data_plane_needs_no_ray() -> None:
    assert violations("experts", {"ray"}) == []


def test_vllm_is_imported_by_modules_that_say_so() -> None:
    assert violations("experts", {"vllm"}, but_where="vllm") == []


def test_the_rooms_are_all_there_is() -> None:
    """The names are generic: nothing else may come into the wheel as a package of its own."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks", "examples"} == {"placement", "experts", "cluster"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_planning_loads_no_framework() -> None:
    statements = [f"import placement.{path.stem}" for path in sources_of("placement") if path.stem != "__init__"]
    assert not loaded_by("\n".join(statements)) & {"ray", "vllm", "torch", "experts", "cluster"}


def test_a_shard_and_a_router_without_an_engine_load_neither_vllm_nor_ray() -> None:
    loaded = loaded_by("import experts.shard_server, experts.router, experts.engine_kwargs, experts.kernels")
    assert "torch" in loaded
    assert not loaded & {"vllm", "ray", "cluster", "transformers"}
