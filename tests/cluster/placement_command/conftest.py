"""Runs `expertmesh placement` in this process against a simulated mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from cluster.placement_command import follow, session
from cluster.placement_command.session import Session
from tests.support.command import run_here
from tests.support.simulated.client import Done, Run, SimulatedClient
from tests.support.simulated.mesh import SimulatedMesh


@pytest.fixture
def client() -> SimulatedClient:
    """Three shards with room for another placement, at rest."""
    mesh = SimulatedMesh(3, slots=6)
    mesh.run_until_still()
    return SimulatedClient(mesh)


@pytest.fixture
def run(client: SimulatedClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command line, as its user would write it after `placement`."""

    @contextlib.contextmanager
    def connected(address: str, app_name: str) -> Iterator[Session]:
        yield Session(client)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "connected", connected)
    monkeypatch.setattr(follow, "POLL_S", 0.0)
    monkeypatch.setattr(follow, "LINE_EVERY_S", 0.0)

    def run(*words: object) -> Done:
        status = run_here("placement", *words)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return run
