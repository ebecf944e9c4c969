"""The tables of mutants follow the sources: what they name is still there."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.mutants.judges import JUDGES

ROOT = Path(__file__).parents[2]
BY_HAND = tomllib.loads((ROOT / "tests/mutants/by_hand.toml").read_text())["mutant"]
EXPLAINED = tomllib.loads((ROOT / "tests/mutants/explained.toml").read_text()).get("survivor", [])


@pytest.mark.parametrize("module", JUDGES)
def test_every_module_has_tests_that_judge_it(module: str) -> None:
    assert (ROOT / module).is_file()
    assert JUDGES[module].arguments(ROOT)


@pytest.mark.parametrize("entry", BY_HAND, ids=lambda entry: entry["why"])
def test_a_mutant_made_by_hand_can_be_made_still(entry: dict[str, str]) -> None:
    assert entry["module"] in JUDGES
    assert (ROOT / entry["module"]).read_text().count(entry["old"]) == 1
    assert entry["old"] != entry["new"]


@pytest.mark.parametrize("entry", EXPLAINED, ids=lambda entry: entry["line"])
def test_an_explained_survivor_stands_in_a_line_that_is_there(entry: dict[str, str]) -> None:
    assert entry["line"] in [line.strip() for line in (ROOT / entry["module"]).read_text().splitlines()]
    assert entry["reason"]
