"""Every small change that can be made to a source: cosmic-ray's operators, and four that it lacks.

A *site* is one place together with one kind of change; its *variants* are the changes of that kind there (`<` becomes
`<=`, `>`, `==`, ...). Sampling sites and then one variant of each keeps arithmetic from crowding out everything else.
"""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

_NEED_ARGUMENTS = ("core/VariableInserter", "core/VariableReplacer")
# `is` and `==` differ on no value that the sources compare, and None in any other comparison raises.
_SAME_OR_ABSURD = re.compile(r"ReplaceComparisonOperator_((Is|IsNot)_(?!Is)|(?!Is)\w+_Is(Not)?$)")
_SPEED_ONLY = ("compiled", "cache", "cached_property")  # decorators without which results are the same


@dataclass(frozen=True)
class Mutant:
    """One changed source. `line` is the first line that differs, counted from 1."""

    operator: str
    line: int
    before: str
    after: str
    source: str


@dataclass(frozen=True)
class Site:
    """One place and one kind of change; each variant is the operator's name and what makes the changed source."""

    kind: str
    line: int
    column: int
    variants: tuple[tuple[str, Callable[[], str | None]], ...]


def sites_of(source: str) -> list[Site]:
    """All sites of a source in a fixed order, but for annotations, docstrings, log calls and the guards of dataclasses,
    on which no result depends, and Numba's intrinsics, which its interpreter does without."""
    unread = _unread_spans(ast.parse(source))
    found: dict[tuple[int, int, str], list[tuple[str, Callable[[], str | None]]]] = defaultdict(list)
    for kind, at, operator, change in (*_cosmic_ray(source), *_own(source)):
        if not any(first <= at < last for first, last in unread):
            found[*at, kind].append((operator, change))
    return [Site(kind, line, column, tuple(found[line, column, kind])) for line, column, kind in sorted(found)]


def mutant_at(site: Site, source: str, chance: random.Random) -> Mutant | None:
    """One variant of a site, None where all of them leave the program as it is or break its syntax."""
    meaning = ast.dump(ast.parse(source))
    for operator, change in chance.sample(site.variants, len(site.variants)):
        changed = change()
        if changed is None:
            continue
        try:
            if ast.dump(ast.parse(changed)) == meaning:
                continue
        except SyntaxError:
            continue
        line, before, after = _first_difference(source, changed)
        return Mutant(operator, line, before, after, changed)
    return None


def _first_difference(source: str, changed: str) -> tuple[int, str, str]:
    old, new = source.splitlines(), changed.splitlines()
    for number, (before, after) in enumerate(zip(old, new, strict=False), 1):
        if before != after:
            return number, before.strip(), after.strip()
    return min(len(old), len(new)), "", ""


Span = tuple[tuple[int, int], tuple[int, int]]


def _span(node: ast.AST) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def _unread_spans(tree: ast.Module) -> list[Span]:
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            spans.append(_span(node.annotation))
        if isinstance(node, ast.arg) and node.annotation is not None:
            spans.append(_span(node.annotation))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spans += [_span(node.returns)] if node.returns is not None else []
            spans += [_whole_line(one) for one in node.decorator_list if _name_of(one) in _SPEED_ONLY]
            if any(_name_of(one) == "intrinsic" for one in node.decorator_list):  # for the compiler alone
                spans.append(_whole_line(node))
        if isinstance(node, ast.ClassDef):
            # That a value cannot be changed changes no value.
            spans += [_whole_line(one) for one in node.decorator_list if _name_of(one) == "dataclass"]
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith(("logger.", "'", '"')):
            spans.append(_span(node))
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("TypeVar(", "Literal[")):
            spans.append(_span(node))
    return spans


def _whole_line(node: ast.AST) -> Span:
    (line, _), end = _span(node)
    first = min([line, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return (first, 0), (end[0], end[1] + 1)


def _name_of(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).rpartition(".")[2]


# --- cosmic-ray ---------------------------------------------------------------------------------------------------

Change = tuple[str, tuple[int, int], str, Callable[[], "str | None"]]


class _Positions(Visitor):
    """Where each operator applies, in the order of its occurrences."""

    def __init__(self, operators: dict[str, object]) -> None:
        self.operators = operators
        self.found: dict[str, list[tuple[int, int]]] = {name: [] for name in operators}

    def visit(self, node: object) -> object:
        for name, operator in self.operators.items():
            self.found[name].extend(start for start, _ in operator.mutation_positions(node))  # type: ignore[attr-defined]
        return node


def _cosmic_ray(source: str) -> Iterator[Change]:
    names = [n for n in sorted(operator_names()) if n not in _NEED_ARGUMENTS and not _SAME_OR_ABSURD.search(n)]
    operators = {name: get_operator(name)() for name in names}
    positions = _Positions(operators)
    positions.walk(get_ast(source))
    for name, places in positions.found.items():
        short = name.removeprefix("core/")
        for occurrence, at in enumerate(places):

            def change(name: str = name, occurrence: int = occurrence) -> str | None:
                return mutate_code(source, operators[name], occurrence)

            yield short.partition("_")[0], tuple(at), short, change


# --- what it lacks ------------------------------------------------------------------------------------------------


def _own(source: str) -> Iterator[Change]:
    """Statements without which a program still runs, functions that return at once, members and keyword arguments that
    are left out."""
    text = _Text(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and _can_be_dropped(node):
            yield text.change("DropStatement", node, node, "pass")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) else node.body[0]
            if not isinstance(first, ast.Return) or first.value is not None:
                before = "return None\n" + " " * first.col_offset
                yield text.change("ReturnAtOnce", node, first, before + (ast.get_source_segment(source, first) or ""))
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            for member in node.elts if len(node.elts) > 2 else ():
                yield text.change("DropMember", member, member, "", with_comma=True)
        if isinstance(node, ast.Call):
            for word in node.keywords:
                if word.arg is not None:
                    yield text.change("DropKeyword", word, word, "", with_comma=True)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None:
                    yield text.change("DropMember", key, key, "", with_comma=True, end_of=value)


def _can_be_dropped(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Await)
    if isinstance(node, ast.Assign):  # a name that is never bound is found by whatever reads it
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise)


class _Text:
    """A source in which nodes' texts can be replaced."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines = source.splitlines(keepends=True)

    def change(
        self,
        kind: str,
        place: ast.AST,
        node: ast.AST,
        text: str,
        with_comma: bool = False,
        end_of: ast.AST | None = None,
    ) -> Change:
        """`node` (to the end of `end_of`) replaced by `text`, and with it the comma that follows, if asked for."""
        start, end = self._at(_span(node)[0]), self._at(_span(end_of or node)[1])

        def make() -> str:
            rest = self._source[end:]
            return self._source[:start] + text + (re.sub(r"^\s*,", "", rest) if with_comma else rest)

        return kind, _span(place)[0], kind, make

    def _at(self, place: tuple[int, int]) -> int:
        line, column = place  # the column in bytes of UTF-8
        before = self._lines[line - 1].encode()[:column].decode()
        return sum(map(len, self._lines[: line - 1])) + len(before)
