"""The mesh's secret through restarts of the controller."""

from __future__ import annotations

import pytest

from cluster.mesh.secret_keeper import SecretKeeper
from experts.protocol.secret import MeshSecret

ONE, OTHER = MeshSecret.generate(), MeshSecret.generate()


def test_a_new_mesh_gets_one_once_nobody_can_bring_one() -> None:
    keeper = SecretKeeper(None)
    assert keeper.agree(None, settled=False) is None
    made = keeper.agree(None, settled=True)
    assert made is not None
    assert made == keeper.agree(None, settled=True) == keeper.agree(None, settled=False)
    assert made != SecretKeeper(None).agree(None, settled=True)


def test_a_restarted_controller_takes_the_first_that_is_brought() -> None:
    keeper = SecretKeeper(None)
    assert keeper.agree(ONE, settled=False) == ONE
    assert keeper.agree(None, settled=True) == ONE
    assert keeper.agree(OTHER, settled=True) == ONE, "who was away meanwhile takes on that of the mesh"


def test_the_configs_secret_counts_whatever_the_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", ONE.reveal())
    assert SecretKeeper("OURS").agree(OTHER, settled=False) == ONE
    monkeypatch.delenv("OURS")
    keeper = SecretKeeper("OURS")
    assert keeper.refusal.startswith("mesh.secret_env: the environment variable OURS holds no secret of the mesh; make")
    assert keeper.agree(None, settled=True) is None, "a new mesh is refused"
    assert keeper.agree(OTHER, settled=True) == OTHER, "one that runs keeps what it has"
