"""The port of NIXL's handshakes that each router tells its engine."""

from __future__ import annotations

import os
import socket

import pytest
from vllm import envs

from cluster.pools.side_channel import PORT, take_side_channel

NIXL = {"kv_connector": "NixlConnector"}


@pytest.fixture(autouse=True)
def without_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PORT, "")  # so that it is as before afterwards
    monkeypatch.delenv(PORT)


@pytest.mark.parametrize("told", [NIXL, {"kv_connector": "MultiConnector", "connectors": [NIXL]}])
def test_a_router_with_nixl_takes_a_free_port(told: object) -> None:
    port = take_side_channel(told)
    assert port is not None
    assert os.environ[PORT] == str(port)
    assert port == envs.VLLM_NIXL_SIDE_CHANNEL_PORT, "where vLLM, and Ray Serve LLM, look for it"
    with socket.socket() as listener:
        listener.bind(("", port))


@pytest.mark.parametrize("told", [None, {"kv_connector": "ExampleConnector"}])
def test_others_take_none(told: object) -> None:
    assert take_side_channel(told) is None
    assert PORT not in os.environ


def test_a_port_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PORT, "5700")
    assert take_side_channel(NIXL) is None
    assert os.environ[PORT] == "5700"
