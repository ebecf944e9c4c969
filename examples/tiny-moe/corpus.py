"""The training text: text of every Python installation, in four domains, split by document.

=========  =====================================================================  ==========================
domain     text                                                                   licence
=========  =====================================================================  ==========================
code       standard library modules, without their docstrings                     PSF License Agreement
prose      docstrings under their signatures, and the topics of `help()`          PSF License Agreement
unicode    code point, category and name of every named character                 Unicode License v3
bytecode   disassembled standard library functions                                PSF License Agreement
=========  =====================================================================  ==========================

Every document belongs to a group: a module, a help topic or a run of 64 code points. A hash of the group's name puts it
on one side of the split in all domains: a held-out module is held out as code, as prose and as bytecode.
"""

import ast
import dis
import hashlib
import inspect
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

DOMAINS = ("code", "prose", "unicode", "bytecode")
LICENCES = {"code": "PSF-2.0", "prose": "PSF-2.0", "unicode": "Unicode-3.0", "bytecode": "PSF-2.0"}
HELD_OUT_ONE_IN = 20
CODE_POINTS_PER_GROUP = 64

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "ensurepip",
    "lib-dynload",
}
SKIPPED_PREFIXES = (
    "config-",
    "_sysconfigdata",
    "_sysconfig_vars",
    "__phello__",
)  # build settings contain the machine's paths
CHARSET_TABLE = re.compile(r"encodings/(cp\d|iso8859|koi8|mac_|ptcp|tis_|hp_|kz1048|gb|big5|euc|johab|shift)")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
CODE_OBJECT = re.compile(r"<code object (\S+), file .*?, line \d+>")
NAMED_BY_RULE = ("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH", "KHITAN SMALL", "NUSHU CHAR")


@dataclass(frozen=True)
class Document:
    """A piece of text. `group` decides its side of the split; `name` is unique within the group."""

    domain: str
    group: str
    name: str
    text: str


@dataclass(frozen=True)
class Module:
    """A standard library module's source, parsed once for all domains."""

    name: str
    source: str
    tree: ast.Module


def is_held_out(group: str) -> bool:
    """Whether the documents of `group` are held out; one group in twenty is, by a hash of its name."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def standard_library_modules(limit: int | None = None) -> Iterator[Module]:
    """The standard library's modules, sorted by path, without tests, installed packages and charset tables.

    Args:
        limit: stop after this many modules (for tests); None for all.

    Raises:
        FileNotFoundError: the installation has no readable source (the library is zipped or stripped).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or any(
            part.startswith(SKIPPED_PREFIXES) for part in relative.parts
        )
        if skipped or CHARSET_TABLE.match(relative.as_posix()) or relative.as_posix() == "pydoc_data/topics.py":
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, OSError):
            continue  # templates for other Python versions and legacy encodings; a few among a thousand modules
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield Module(name, source, tree)
        found += 1
        if found == limit:
            return
    if not found:
        raise FileNotFoundError(f"no standard library source under {root}: expected .py files there")


def documented_nodes(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Module, class and function nodes with their qualified names ("" for the module itself), outermost first."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        yield prefix, node
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{prefix}.{child.name}" if prefix else child.name, child))


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without the lines of docstrings (`pass` where nothing else is left)."""
    lines: list[str | None] = list(source.splitlines())
    for _, node in documented_nodes(tree):
        body = getattr(node, "body", [])
        if not body or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Constant):
            continue
        expr = body[0]
        if not isinstance(expr.value.value, str) or (lines[expr.lineno - 1] or "")[: expr.col_offset].strip():
            continue
        for index in range(expr.lineno - 1, (expr.end_lineno or expr.lineno)):
            lines[index] = None
        if len(body) == 1:
            lines[expr.lineno - 1] = " " * expr.col_offset + "pass"
    kept = "\n".join(line.rstrip() for line in lines if line is not None)
    return re.sub(r"\n{4,}", "\n\n\n", kept).strip() + "\n"


def signature(qualified_name: str, node: ast.AST) -> str:
    """The line `help()` would start with, from the syntax tree alone."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{qualified_name}({ast.unparse(node.args)})"
    if isinstance(node, ast.ClassDef):
        return f"class {qualified_name}({', '.join(ast.unparse(base) for base in node.bases)})"
    return f"module {qualified_name}"


def docstrings(module: Module) -> Iterator[tuple[str, str, str]]:
    """(qualified name, signature line, docstring) of everything with a docstring of at least 40 characters."""
    for name, node in documented_nodes(module.tree):
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
        if text and len(text) >= 40:
            qualified = f"{module.name}.{name}" if name else module.name
            yield qualified, signature(qualified, node), inspect.cleandoc(text)


def builtin_docstrings() -> Iterator[tuple[str, str, str]]:
    """(module, qualified name, docstring) of the functions and types compiled into the interpreter."""
    for module_name in sorted(sys.builtin_module_names):
        try:
            module = __import__(module_name)
        except ImportError:
            continue
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value):
                continue
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for qualified, item in [(name, value)] + [(f"{name}.{key}", member) for key, member in members]:
                text = getattr(item, "__doc__", None)
                if isinstance(text, str) and len(text) >= 40:
                    yield module_name, f"{module_name}.{qualified}", inspect.cleandoc(text)


def disassemble(code: object) -> str:
    """Offset, operation and argument of each instruction of a code object, without addresses and file names."""
    lines = []
    for step in dis.get_instructions(code):  # type: ignore[arg-type]
        argument = ADDRESS.sub("", CODE_OBJECT.sub(r"<code \1>", ADDRESS.sub("", step.argrepr)))
        if isinstance(step.argval, frozenset):  # sorted, since the order depends on the hash seed
            argument = f"frozenset({{{', '.join(sorted(map(repr, step.argval)))}}})"
        lines.append(f"{step.offset} {step.opname} {argument}".rstrip())
    return "\n".join(lines)


def compiled_functions(module: Module) -> Iterator[tuple[str, str]]:
    """(header, disassembly) of a module's functions of readable length, nested ones included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stack = [compile(module.source, module.name, "exec", dont_inherit=True)]
        except (SyntaxError, ValueError):
            return
    while stack:
        code = stack.pop()
        stack.extend(item for item in code.co_consts if isinstance(item, type(code)))
        if code.co_name != "<module>" and 40 <= len(code.co_code) <= 1000:
            arguments = ", ".join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
            yield f"{code.co_qualname}({arguments}):", disassemble(code)


def unicode_groups(limit: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """(group, lines) of named characters, 64 code points per group, without names that only repeat the number."""
    last = 0x20000 if limit is None else limit * CODE_POINTS_PER_GROUP
    for start in range(0, last, CODE_POINTS_PER_GROUP):
        lines = []
        for point in range(start, start + CODE_POINTS_PER_GROUP):
            name = unicodedata.name(chr(point), "")
            if name and not name.startswith(NAMED_BY_RULE):
                lines.append(f"U+{point:04X} {unicodedata.category(chr(point))} {name}")
        if len(lines) >= 8:
            yield f"unicode:{start:05X}", lines


def raw_documents(limit_modules: int | None = None) -> Iterator[Document]:
    """All documents, duplicates included; `limit_modules` limits modules, topics and groups (for tests)."""
    for module in standard_library_modules(limit_modules):
        yield Document("code", module.name, module.name, without_docstrings(module.source, module.tree))
        for name, head, text in docstrings(module):
            yield Document("prose", module.name, name, f"{head}\n\n{text}\n")
        for name, text in compiled_functions(module):
            yield Document("bytecode", module.name, name, f"{name}\n{text}\n")
    for module_name, name, text in islice(builtin_docstrings(), limit_modules):
        yield Document("prose", module_name, name, f"{name}\n\n{text}\n")
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items())[:limit_modules]:
        yield Document("prose", f"topic:{name}", name, text.strip() + "\n")
    for group, lines in unicode_groups(limit_modules):
        yield Document("unicode", group, group, "\n".join(lines) + "\n")


def build_corpus(limit_modules: int | None = None) -> tuple[list[Document], list[Document]]:
    """The (training, held-out) documents, each text once; held-out texts that are also trained on are dropped."""
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[bytes] = set()
    later: list[Document] = []
    for document in raw_documents(limit_modules):
        if is_held_out(document.group):
            later.append(document)
            continue
        key = text_key(document.text)
        if key not in seen:
            seen.add(key)
            train.append(document)
    for document in later:
        key = text_key(document.text)
        if key not in seen:
            seen.add(key)
            held_out.append(document)
    return train, held_out


def text_key(text: str) -> bytes:
    """A hash of the text after its first line (the name), ignoring white space: equal hashes, same document."""
    body = text.split("\n", 1)[-1] or text
    return hashlib.blake2b(" ".join(body.split()).encode(errors="replace"), digest_size=16).digest()
