"""The pages that are made from code say what the code says, and the site has no broken link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.reference import architectures_page, config_page, http_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def spoken(text: str) -> str:
    """Source with the seams of its strings taken out, so that a message that goes over lines can be found."""
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_the_config_page_is_the_schema() -> None:
    assert (DOCS / "config.md").read_text() == config_page.page(), (
        "run: python -m cluster.reference.config_page > docs/config.md"
    )


def test_the_config_page_has_every_key_with_words() -> None:
    rows = [line.split(" | ") for line in config_page.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row[0] for row in rows if len(row) != 4 or len(row[3]) < 10] == []


def test_the_architectures_page_is_the_table() -> None:
    assert (DOCS / "architectures.md").read_text() == architectures_page.page(), (
        "run: python -m cluster.reference.architectures_page > docs/architectures.md"
    )


def test_the_http_page_has_the_routes() -> None:
    text = (DOCS / "http.md").read_text()
    assert text == http_page.written(text), "run: python -m cluster.reference.http_page docs/http.md"


def test_a_page_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has no <!-- endpoints"):
        http_page.written("# HTTP\n")


def test_errors_that_the_troubleshooting_page_explains_are_in_the_source() -> None:
    headings = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 25
    sources = "\n".join(
        spoken(path.read_text())
        for folder in ("cluster", "experts", "placement")
        for path in (ROOT / folder).rglob("*.py")
    )
    pieces = {piece.strip() for heading in headings for piece in heading.split("...")}
    assert sorted(piece for piece in pieces if piece not in sources) == []


def rows_of_features() -> list[list[str]]:
    """The cells of each row: feature, state, how or why not, tests."""
    lines = (DOCS / "features.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [cells for cells in rows if cells[0] != "feature"]


@pytest.mark.parametrize("cells", rows_of_features(), ids=lambda cells: cells[0])
def test_what_the_features_page_says_has_tests_that_exist(cells: list[str]) -> None:
    _, state, why, tests = cells
    assert state in ("works", "refused", "not tried")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert bool(named) == (state != "not tried"), "a row names tests, unless nobody tried"
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text()
    assert why or state != "refused"


def test_errors_that_the_features_page_quotes_are_expected_by_its_tests() -> None:
    """In full sentences, which option names are not."""
    spans = [(span, cells[3]) for cells in rows_of_features() for span in re.findall(r"`([^`]+)`", cells[2])]
    errors = [(span, tests) for span, tests in spans if span.count(" ") >= 2 and ":" not in span]
    assert len(errors) >= 10
    for text, tests in errors:
        files = {file: (ROOT / file).read_text() for file in re.findall(r"`(tests/[\w/]+\.py)::", tests)}
        assert any(text in spoken(source) for source in files.values()), f"{text!r} is in none of {sorted(files)}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs-material makes the site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert pages == {path.stem for path in DOCS.glob("*.md")}
    home = (tmp_path / "site" / "index.html").read_text()
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"\s>]+)", home)
    assert loaded == [], "nothing is loaded from elsewhere"
