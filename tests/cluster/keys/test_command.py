"""`keys new`: the line lets the key in, and the key stands nowhere else."""

from __future__ import annotations

import io

import pytest

from cluster.keys.keyring import Key, Limits, parse_keys
from tests.support.command import run_here


def test_the_line_lets_the_key_in_and_does_not_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--concurrency", "4"]
    assert run_here("keys", "new", "--name", "team-a", *limits, "--model", "m", "--model", "n") == 0
    told = capsys.readouterr()
    key = told.err.split()[-1]
    assert key.startswith("sk-")
    assert len(key) > 40
    assert key not in told.out
    assert parse_keys(told.out, "out").find(key) == Key(
        "team-a", limits=Limits(60, 9000, 4), models=frozenset({"m", "n"})
    )
    run_here("keys", "new", "--name", "team-a")
    assert capsys.readouterr().err.split()[-1] != key


def test_a_key_in_use_keeps_its_holder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-known\n"))
    assert run_here("keys", "new", "--name", "ops", "--role", "admin", "--stdin") == 0
    told = capsys.readouterr()
    assert parse_keys(told.out, "out").find("sk-known") == Key("ops", "admin")
    assert told.err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a b"], "--name: 'a b' is no name"),
        (["--name", "a", "--concurrency", "0"], "--concurrency: Input should be greater than or equal to 1"),
        (["--name", "a", "--stdin"], "there is no key on the standard input"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run_here("keys", "new", *options) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {message}")
    assert told.out == ""
