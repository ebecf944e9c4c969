"""The command as a whole: what it loads, how it ends, completion, its page."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cluster.command import reference
from cluster.command.main import app
from placement.command.ending import MEANING, Ending
from tests.support.command import COMMAND, ROOT, environment, run_command, run_here

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def commands(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command and group."""
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, *words, name)


ALL = dict(commands(typer.main.get_command(app)))


def test_pyproject_names_this_command_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"expertmesh": "cluster.command.main:main"}


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_is_there(words: tuple[str, ...]) -> None:
    result = RUNNER.invoke(app, [*words, "--help"], prog_name="expertmesh")
    assert result.exit_code == 0
    assert " ".join(("Usage: expertmesh", *words)) in result.output
    for name in getattr(ALL[words], "commands", {}):
        assert f" {name} " in result.output


@pytest.mark.parametrize("words", [words for words, each in ALL.items() if not hasattr(each, "commands")], ids=" ".join)
def test_every_command_prints_json_and_describes_its_options(words: tuple[str, ...]) -> None:
    params = ALL[words].params
    assert any("--json" in each.opts for each in params)
    assert [each.name for each in params if not each.help] == []


def test_the_help_has_every_exit_code() -> None:
    told = RUNNER.invoke(app, ["--help"]).output
    assert set(MEANING) == set(Ending)
    for ending, meaning in MEANING.items():
        assert f"{int(ending)}: {meaning}" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serv"], "No such command 'serv'. Did you mean 'serve'?"),
        (["serve"], "Missing argument 'CONFIG'"),
        (["serve", "x.yaml", "--port", "0"], "greater than or equal to 1, got '0'"),
        (["size", "mixtral-8x7b", "--kv-dtype", "fp4"], "'--kv-dtype': 'fp4' is not one of 'auto', 'fp8' (`"),
        (["size", "mixtral-8x7b", "--rate", "many"], "valid number, unable to parse string as a number, got 'many'"),
        (["size"], "expected either a model"),
        (["keys", "new"], "Missing option '--name'"),
        (["placement", "optimize", "--fast"], "No such option: --fast"),
        (["bench", "nothing"], "no benchmark is named 'nothing', expected one of autopilot, "),
        (["status", "--looks", "0"], "greater than or equal to 1, got '0'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], told: str) -> None:
    result = RUNNER.invoke(app, words, prog_name="expertmesh")
    assert result.exit_code == Ending.USAGE
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_value_of_the_environment_is_an_option(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("EXPERTMESH_HTTP_PORT", "eighty")
    assert run_here("serve", "x.yaml") == Ending.USAGE
    assert "'eighty'" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--help", "version", "size --models", "keys new --name x", "placement --help"])
def test_it_starts_without_what_is_heavy(words: str) -> None:
    code = (
        "import sys\nfrom cluster.command.main import app\n"
        f"try:\n    app({words.split()!r}, standalone_mode=False)\nfinally:\n"
        "    heavy = {'torch', 'vllm', 'ray', 'numba', 'transformers'} & sys.modules.keys()\n"
        "    print('heavy', *heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "heavy"


def test_help_needs_neither_numpy_nor_yaml() -> None:
    code = "import sys, cluster.command.main; print(*{'numpy', 'yaml', 'fastapi', 'asyncio'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_a_process_ends_with_the_code_and_without_colours() -> None:
    done = run_command("size", "mixtral-8x7b", "--gpu", "h999")
    assert (done.returncode, done.stdout) == (Ending.USAGE, "")
    assert done.stderr.startswith("error: GPU 'h999' is unknown, expected one of h100")
    for words in (["--help"], ["placement", "--help"], ["version"]):
        assert "\x1b" not in run_command(*words).stdout


def test_a_command_ends_although_a_library_leaves_a_thread_that_does_not() -> None:
    code = (
        "import threading, typer\nfrom placement.command import ending\n"
        "ending.LEAVE_S = 0.1\napp = typer.Typer(cls=ending.CommandGroup)\n@app.callback()\ndef group(): ...\n"
        "@app.command()\ndef done():\n    threading.Thread(target=threading.Event().wait).start()\n"
        "    ending.tell(False, None, ['told'])\n    raise ending.CommandError('refused')\n"
        "ending.leave(app(['done'], standalone_mode=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (Ending.REFUSED, "told\n", "error: refused\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("expertmesh pla", "placement"), ("expertmesh size --gpu h2", "h200"), ("expertmesh keys new --ro", "--role")],
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=environment(_EXPERTMESH_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert offered in done.stdout.split(), done.stderr


def test_completion_can_be_shown_and_installed(tmp_path: Path) -> None:
    """In bash, which typer finds among the processes above."""
    home, line = str(tmp_path), " ".join(COMMAND)
    (tmp_path / ".bashrc").write_text("")
    env = environment(HOME=home)

    def in_bash(words: str) -> str:
        code = f"{line} {words}; exit $?"  # two commands, so that bash stays above the first
        done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "_EXPERTMESH_COMPLETE=complete_bash" in in_bash("--show-completion")
    assert "bash completion installed" in in_bash("--install-completion")
    assert "expertmesh" in (tmp_path / ".bashrc").read_text()


def test_version_says_what_is_installed_and_compiled() -> None:
    told = json.loads(run_command("version", "--json").stdout)
    assert told["folder"] == str(ROOT)
    assert told["packages"].keys() >= {"ray", "torch", "numba"}
    assert set(told["compiled"]) == {
        *("data plane (C++)", "expert kernel (C++)", "planner (Numba)", "data plane (Numba)"),
    }


def test_the_page_is_true() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == reference.page(), (
        "run: python -m cluster.command.reference > docs/cli.md"
    )
