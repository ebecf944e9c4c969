"""Classes and type aliases of the installed vLLM as pydantic types, read from its source files.

Whatever builds an application must know vLLM's options and their types, and must not import vllm, which takes ten
seconds and hundreds of megabytes. `tests/experts/vllm_plugin/test_engine_options.py` compares what is read here with
the imported classes.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

_CONSTRAINTS = {"gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length"}
_ENUMS = {"Enum", "IntEnum", "StrEnum"}


class _Unknown:
    """Stands for a class from elsewhere, such as torch.device. A type that contains it is not checked."""

    def __getattr__(self, name: str) -> _Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, item: Any) -> _Unknown:
        return self

    def __or__(self, other: Any) -> _Unknown:
        return self

    __ror__ = __or__


class _Itself:
    """InitVar[X] is X to whoever calls the constructor."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item


_UNKNOWN = _Unknown()
_TYPING: dict[str, Any] = {
    **{kind.__name__: kind for kind in (int, float, str, bool, dict, list, set, tuple)},
    **{"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union, "Annotated": Annotated, "Field": Field},
    "Mapping": dict,
    "Sequence": list,
    "InitVar": _Itself,
}


@dataclass(frozen=True)
class _Definition:
    """Where a name of vLLM is defined: a class, or the value assigned to it."""

    module: str
    node: ast.ClassDef | ast.expr


class VllmSource:
    """The source of one installed vLLM."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[tuple[str, str], Any] = {}
        self._bindings = functools.cache(self._read_bindings)

    @classmethod
    def installed(cls) -> VllmSource | None:
        """The vLLM that this interpreter would import, without importing it; None where there is none."""
        spec = importlib.util.find_spec("vllm")
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        return cls(Path(folders[0])) if folders else None

    def fields(self, module: str, name: str) -> dict[str, tuple[str, ast.AnnAssign]]:
        """What a dataclass's constructor takes, with its base classes: {field: (module, node)}.

        Raises LookupError if there is no such class.
        """
        found = self._find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            raise LookupError(f"this vllm has no class {module}.{name}")
        fields: dict[str, tuple[str, ast.AnnAssign]] = {}
        for base in found.node.bases:
            if isinstance(base, ast.Name) and self._class_of(found.module, base.id) is not None:
                fields |= self.fields(found.module, base.id)
        for node in found.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_argument(node):
                fields[node.target.id] = (found.module, node)
        return fields

    def type_of(self, module: str, name: str, field: str) -> Any:
        """The type of a dataclass's field, for pydantic; Any where it is not known."""
        where, node = self.fields(module, name)[field]
        kind = self._field_type(where, node, self._validators(module, name))
        return kind if _has_schema(kind) else Any

    def same_field(self, module: str, node: ast.AnnAssign) -> tuple[str, str, str] | None:
        """(module, class, field) that a field takes its default from: `= C.f` or `= get_field(C, "f")`."""
        match node.value:
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
                pass
            case ast.Call(func=ast.Name(id="get_field"), args=[ast.Name(id=owner), ast.Constant(value=str(attribute))]):
                pass
            case _:
                return None
        found = self._class_of(module, owner)
        return (found.module, owner, attribute) if found is not None else None

    # Names -----------------------------------------------------------------------------------------------------------

    def _read_bindings(self, module: str) -> dict[str, ast.ClassDef | ast.expr | tuple[str, str]]:
        """What each name of a module is bound to: a class, an expression, or (module, name) that it imports."""
        path = self._folder.joinpath(*module.split(".")[1:])
        package = path.is_dir()
        path = path / "__init__.py" if package else path.with_suffix(".py")
        bindings: dict[str, ast.ClassDef | ast.expr | tuple[str, str]] = {}
        if not path.exists():
            return bindings
        for node in _statements(ast.parse(path.read_text()).body):
            match node:
                case ast.ClassDef(name=name):
                    bindings[name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    bindings[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    bindings[name] = value
                case ast.ImportFrom(module=source, names=names, level=level):
                    if level:
                        parts = module.split(".")[: None if package and level == 1 else -(level - package)]
                        source = ".".join([*parts, *([source] if source else [])])
                    bindings |= {alias.asname or alias.name: (str(source), alias.name) for alias in names}
        return bindings

    def _find(self, module: str, name: str) -> _Definition | None:
        for _ in range(10):  # imports that hand a name on
            bound = self._bindings(module).get(name)
            if bound is None:
                return None
            if not isinstance(bound, tuple):
                return _Definition(module, bound)
            module, name = bound
            if module.partition(".")[0] != "vllm":
                return None
        return None

    def _class_of(self, module: str, name: str) -> _Definition | None:
        found = self._find(module, name)
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None

    def _validators(self, module: str, name: str) -> dict[str, str]:
        """The mode of each field's validator in a class: before, after, wrap or plain. "*" is for every field."""
        found = self._class_of(module, name)
        modes: dict[str, str] = {}
        for function in ast.walk(found.node) if found is not None else ():
            for decorator in getattr(function, "decorator_list", ()):
                match decorator:
                    case ast.Call(func=ast.Name(id="field_validator"), args=args, keywords=keywords):
                        mode = next((ast.literal_eval(k.value) for k in keywords if k.arg == "mode"), "after")
                        modes |= {str(arg.value): mode for arg in args if isinstance(arg, ast.Constant)}
        return modes

    # Types -----------------------------------------------------------------------------------------------------------

    def _field_type(self, module: str, node: ast.AnnAssign, validators: dict[str, str]) -> Any:
        validator = validators.get(ast.unparse(node.target), validators.get("*"))
        kind = self._type(module, node.annotation)
        limits: dict[str, Any] = {}
        default: ast.expr | None = node.value
        if isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            default = given.get("default")
            limits = {
                key: ast.literal_eval(value)
                for key, value in given.items()
                if key in _CONSTRAINTS and not any(isinstance(part, ast.Name) for part in ast.walk(value))
            }
        if validator in ("before", "plain"):  # it may turn the value into the type
            if "one of" not in repr(kind):
                return Any
            kind = kind | Literal["auto"]
        if limits and not isinstance(kind, _Unknown):
            kind = Annotated[kind, Field(**limits)]
        empty = isinstance(default, ast.Constant) and default.value is None
        # vLLM's validators of mode wrap let None through.
        return Optional[kind] if (empty or validator == "wrap") and not isinstance(kind, _Unknown) else kind  # noqa: UP045

    def _type(self, module: str, annotation: ast.expr) -> Any:
        """The type that an annotation names, _UNKNOWN if it cannot be told."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        names = _Names(functools.partial(self._named_type, module))
        try:
            return eval(compile(ast.Expression(annotation), module, "eval"), {"__builtins__": {}}, names)
        except Exception:  # an annotation of a kind that a later vLLM brings
            return _UNKNOWN

    def _named_type(self, module: str, name: str) -> Any:
        found = self._find(module, name)
        if found is None:
            return _TYPING.get(name, _UNKNOWN)
        if not isinstance(found.node, ast.ClassDef):
            return self._type(found.module, found.node)
        if any(ast.unparse(base).rpartition(".")[2] in _ENUMS for base in found.node.bases) or "Enum" in name:
            return _enum(found.node)
        if any("config" in ast.unparse(decorator) for decorator in found.node.decorator_list):
            return self._model(found.module, found.node.name)
        return _UNKNOWN

    def _model(self, module: str, name: str) -> Any:
        """A config class of vLLM as a pydantic model, of which nothing is required."""
        key = (module, name)
        if key not in self._models:
            self._models[key] = _UNKNOWN  # should it contain itself
            validators = self._validators(module, name)
            fields: dict[str, Any] = {}
            for field, (where, node) in self.fields(module, name).items():
                kind = self._field_type(where, node, validators)
                fields[field] = (kind if _has_schema(kind) else Any, None)
            self._models[key] = create_model(
                name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **_public(fields)
            )
        return self._models[key]


class _Names(dict[str, Any]):
    """Names in an annotation, looked up when they are asked for."""

    def __init__(self, look_up: Any) -> None:
        self._look_up = look_up

    def __missing__(self, name: str) -> Any:
        return self._look_up(name)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module in order, those below `if` and `try` too: what runs (`else`) comes last."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _is_argument(node: ast.AnnAssign) -> bool:
    """Whether a class variable is an argument of a dataclass's constructor."""
    if ast.unparse(node.annotation).startswith("ClassVar"):
        return False
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords)


def _enum(node: ast.ClassDef) -> Any:
    """An enum in a config file: the name or the value of a member, in either case."""
    members: dict[str, Any] = {}
    for assignment in node.body:
        if isinstance(assignment, ast.Assign) and isinstance(assignment.targets[0], ast.Name):
            value = assignment.value
            members[assignment.targets[0].id] = value.value if isinstance(value, ast.Constant) else None
    known = {str(word).upper() for member in members.items() for word in member if word is not None}

    def check(value: Any) -> Any:
        if str(int(value) if isinstance(value, bool) else value).upper() not in known:
            near = difflib.get_close_matches(str(value).upper(), members, 3, 0.3) or list(members)[:8]
            names = list(members) if len(members) <= 8 else near
            raise ValueError(f"expected one of {', '.join(names)}{'' if names == list(members) else ', ...'}")
        return value

    check.__qualname__ = f"one of {node.name}"
    return Annotated[Any, AfterValidator(check)]


def _has_schema(kind: Any) -> bool:
    if isinstance(kind, _Unknown):
        return False
    try:
        TypeAdapter(kind)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return False
    return True


def _public(fields: dict[str, Any]) -> dict[str, Any]:
    """Pydantic takes no field with a leading underscore; vLLM's are not for users."""
    return {name: field for name, field in fields.items() if not name.startswith("_")}
