"""Ports that a cluster on this machine takes."""

from __future__ import annotations

import socket

import pytest

from cluster import serve_environment
from cluster.serve_environment import metrics_port
from tests.support.waiting import free_ports


def test_the_metrics_port_is_the_usual_one_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_environment.USUAL_METRICS_PORT == 8080, "as KubeRay has it"
    [usual] = free_ports(1)
    monkeypatch.setattr(serve_environment, "USUAL_METRICS_PORT", usual)
    assert metrics_port({}) == usual
    with socket.create_server(("127.0.0.1", usual)):
        assert metrics_port({}) not in (usual, 0)
        assert metrics_port({"EXPERTMESH_METRICS_PORT": "7"}) == 7
