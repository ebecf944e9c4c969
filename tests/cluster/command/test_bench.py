"""`expertmesh bench` on a made-up checkout: what it lists, runs, hands on and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.command import bench
from placement.command.ending import CommandError
from tests.support.command import ROOT, run_here

ONE = """
import json, pathlib, sys
if __name__ == "__main__":
    print("words", *sys.argv[1:])
    folder = pathlib.Path("bench-results")
    folder.mkdir(exist_ok=True)
    (folder / "one.json").write_text(json.dumps({"us": 3}))
    sys.exit(int("--fail" in sys.argv))
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "benchmarks"
    (folder / "group").mkdir(parents=True)
    for path in (folder, folder / "group"):
        (path / "__init__.py").touch()
    (folder / "common.py").write_text("A = 1\n")
    (folder / "__main__.py").write_text('if __name__ == "__main__":\n    print("all of them")\n')
    (folder / "group" / "one.py").write_text(ONE)
    (folder / "group" / "__main__.py").write_text(ONE)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    return tmp_path


def test_it_lists_what_can_be_run(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("bench", "--list") == 0
    assert capsys.readouterr().out.split() == ["group", "group.one"]
    assert run_here("bench", "--list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == ["group", "group.one"]


def test_it_hands_options_on_and_keeps_the_output(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here("bench", "group.one", "--quick", "--seconds", "3") == 0
    assert capfd.readouterr().out == "words --quick --seconds 3\n"
    assert run_here("bench") == 0
    assert capfd.readouterr().out == "all of them\n"


def test_json_has_what_was_written(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here("bench", "group.one", "--json") == 0
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert (told["exit_status"], told["results"], err) == (0, {"one": {"us": 3}}, "words\n")


def test_a_benchmark_that_fails_is_told(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here("bench", "group.one", "--fail") == 1
    assert capfd.readouterr().err == "error: benchmarks.group.one ended with status 1\n"
    assert run_here("bench", "--fail") == 2
    assert capfd.readouterr().err == "error: no benchmark is named '--fail', expected one of group, group.one\n"


def test_without_a_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=f"there are no benchmarks in {tmp_path}: they are no part of the installed"):
        bench.benchmarks(tmp_path)


def test_all_benchmarks_of_this_checkout_are_known() -> None:
    known = bench.benchmarks(ROOT)
    assert {"data_plane.soak", "serving.upgrade", "placement", "gpu"} <= set(known)
