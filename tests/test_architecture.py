"""What the design says of the source: imports run one way, vllm and ray stay in their rooms, files stay readable."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["placement", "experts", "cluster", "serve_app"]  # each may import those before it

# Inside a room a folder, or a file beside the folders, may import those before it.
ORDER = {
    "placement": [
        *(
            "compile_cache",
            "compiled",
            "xorshift",
            "progress",
            "speeds",
            "linear",
            "placement",
            "topology",
            "traces",
            "rule",
            "capacity",
            "search",
            "migration",
        ),
        *("sizing", "report", "exports", "policy", "precompile", "command"),
    ],
    "experts": [
        *("model", "protocol", "native", "checkpoint", "transports", "kernels", "dispatch", "shard", "kv_transfer"),
        *("inductor_joint", "vllm_plugin", "precompile"),
    ],
    "cluster": [
        *(
            "config",
            "autoscaling",
            "priority",
            "serve_environment",
            "ray_joints",
            "keys",
            "autopilot",
            "mesh",
            "observability",
            "controller",
            "shard",
            "http",
            "adapters",
            "pools",
            "signatures",
            "router",
            "gateway",
            "console",
            "reference",
        ),
        *("refusals", "build", "start_up", "haproxy_guard", "log_format", "serving", "placement_command"),
        *("canary_command", "sizing_command", "status_command", "check_command", "command"),
    ],
}

MAX_LINES = 350
MAX_FILES = 14  # of sources in one folder
SOURCES = sorted(
    path
    for room in (*ROOMS, "benchmarks", "examples", "tests")
    for path in ([ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py"))
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """The nodes of a file that the tests look at: imports and calls."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom | ast.Call))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of everything that a file imports, inside functions too."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((str(a.value), node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant))


def packages_of(path: Path) -> Iterator[tuple[str, int]]:
    """(top-level package, line) of everything that a file imports."""
    return ((module.partition(".")[0], line) for module, line in imports_of(path))


def sources_of(room: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] in (room, f"{room}.py")]


def violations(room: str, forbidden: set[str], *, but_where: str = "\0") -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {package}"
        for path in sources_of(room)
        if but_where not in str(path.relative_to(ROOT))
        for package, line in packages_of(path)
        if package in forbidden
    ]


def test_every_room_has_sources() -> None:
    assert all(sources_of(room) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    assert violations(room, {*ROOMS[ROOMS.index(room) + 1 :], "benchmarks", "tests", "examples"}) == []


@pytest.mark.parametrize("room", ORDER)
def test_imports_inside_a_room_run_one_way(room: str) -> None:
    order = ORDER[room]
    parts = {path.relative_to(ROOT / room).with_suffix("").parts[0] for path in sources_of(room)} - {"__init__"}
    assert parts == set(order), "ORDER names the folders and files of the room"
    wrong = []
    for path in sources_of(room):
        here = path.relative_to(ROOT / room).with_suffix("").parts[0]
        for module, line in imports_of(path):
            top, _, rest = module.partition(".")
            if top == room and rest and here != "__init__":
                there = rest.partition(".")[0]
                if order.index(there) > order.index(here):
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_no_import_runs_in_a_circle() -> None:
    """Not by way of an import inside a function either."""
    graph = {
        module: {name for name, _ in imports_of(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("room", [*ORDER, "benchmarks"])
def test_a_folder_holds_few_files_and_says_what_belongs_there(room: str) -> None:
    for folder in {path.parent for path in sources_of(room)}:
        assert len(list(folder.glob("*.py"))) <= MAX_FILES, f"{folder}: too many files for one noun"
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert text.count(".") >= 2, f"{folder}/__init__.py: say in two sentences what belongs there and what does not"


def private_imports() -> Iterator[str]:
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("tests", "examples"):
            continue
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ROOMS:
                names = [alias.name for alias in node.names if alias.name.startswith("_")]
                if names:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} imports {', '.join(names)} of {node.module}"


def test_no_file_imports_the_private_names_of_another() -> None:
    assert list(private_imports()) == []


def test_what_tests_share_is_in_tests_support() -> None:
    """A test module or a conftest that lends names cannot be moved or run without the tests that borrow them."""
    borrowed = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in SOURCES
        for module, line in imports_of(path)
        if any(part.startswith("test_") or part == "conftest" for part in module.split("."))
    ]
    assert borrowed == []


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


def test_files_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_planning_loads_no_framework() -> None:
    statements = [f"import {module_of(path)}" for path in sources_of("placement") if path.stem != "__main__"]
    assert not loaded_by("\n".join(statements)) & {"ray", "vllm", "torch", "experts", "cluster"}


def test_a_shard_and_a_router_without_an_engine_load_neither_vllm_nor_ray() -> None:
    modules = "experts.shard.server experts.dispatch.mesh_client experts.vllm_plugin.engine_kwargs experts.kernels"
    loaded = loaded_by("\n".join(f"import {module}" for module in modules.split()))
    assert "torch" in loaded
    assert not loaded & {"vllm", "ray", "cluster", "transformers"}
