"""Which models the installed vLLM registers, and which of them have routed experts, read from its source files.

A model counts as having experts if the module of its class, or one that this imports, makes vLLM's fused MoE layer.
Dense models that share a module with their MoE siblings are among them.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

_REGISTRY = "vllm.model_executor.models.registry"
_MODELS = ("vllm.model_executor.models", "vllm.models")
_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
_DRAFTS = "_SPECULATIVE_DECODING_MODELS"
_BY_TRANSFORMERS = "_TRANSFORMERS_SUPPORTED_MODELS"
_LAYERS = ("FusedMoEFactory", "FusedMoE", "SharedFusedMoE")
# Of interfaces and tools, which many modules import and which name other models.
_NO_MODELS = {"interfaces", "interfaces_base", "utils", "registry", "vision"}


@dataclass(frozen=True)
class Registered:
    """One architecture: the module of its class, and whether it guesses tokens for another model."""

    name: str
    module: str
    class_name: str
    draft: bool = False


class ModelRegistry:
    """The registry of one vLLM. `folder` is that of the package `vllm`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts = functools.cache(self._read_facts)

    @functools.cached_property
    def registered(self) -> dict[str, Registered]:
        """All models that generate, by architecture. LookupError if the registry is not where it was."""
        found: dict[str, Registered] = {}
        path = self._folder.joinpath(*_REGISTRY.split(".")[1:]).with_suffix(".py")
        tables = {} if not path.exists() else _tables(ast.parse(path.read_text()))
        for table in (*_TABLES, _DRAFTS, _BY_TRANSFORMERS):
            if table not in tables:
                raise LookupError(f"this vllm has no {_REGISTRY}.{table}")
            for name, (module, class_name) in tables[table].items():
                full = module if module.startswith("vllm.") else f"{_MODELS[0]}.{module}"
                found.setdefault(name, Registered(name, full, class_name, table == _DRAFTS))
        return found

    def with_experts(self) -> dict[str, Registered]:
        """Those that may have routed experts."""
        return {name: entry for name, entry in self.registered.items() if self._has_experts(entry)}

    def _has_experts(self, entry: Registered) -> bool:
        if entry.module.endswith(".transformers"):  # one module for all, but the class says it
            return "MoE" in entry.class_name
        seen, waiting = set(), [entry.module]
        while waiting:
            module = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            makes_layer, imported = self._facts(module)
            if makes_layer:
                return True
            waiting += imported
        return False

    def _read_facts(self, module: str) -> tuple[bool, frozenset[str]]:
        """(whether a module or package makes a MoE layer, the modules of models that it imports)."""
        path = self._folder.joinpath(*module.split(".")[1:])
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        makes_layer, imported = False, set()
        for file in files:
            if not file.exists():
                continue
            package = ["vllm", *file.parent.relative_to(self._folder).parts]
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                    makes_layer = makes_layer or called in _LAYERS
                elif isinstance(node, ast.ImportFrom):
                    imported |= _models_in(node, package)
        return makes_layer, frozenset(imported - {module})


def _tables(tree: ast.Module) -> dict[str, dict[str, tuple[str, str]]]:
    """The registry's literals by name."""
    found = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict() as value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict() as value):
                pass
            case _:
                continue
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:  # made of other tables
            continue
    return found


def _models_in(node: ast.ImportFrom, package: list[str]) -> set[str]:
    """Modules of models that an import names, from a file of `package`. A package of vllm.models is one module."""
    source = node.module or ""
    if node.level:
        source = ".".join([*package[: len(package) - node.level + 1], *([source] if source else [])])
    names = {f"{source}.{alias.name}" for alias in node.names} if source in _MODELS else {source}
    found = set()
    for name in names:
        for root in _MODELS:
            if name.startswith(f"{root}."):
                module = ".".join(name.split(".")[: root.count(".") + 2])
                if module.rpartition(".")[2] not in _NO_MODELS:
                    found.add(module)
    return found
