"""Ports that a cluster on this machine takes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster import serve_environment
from cluster.serve_environment import free_ports, metrics_port


def test_the_metrics_port_is_the_usual_one_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_environment.USUAL_METRICS_PORT == 8080, "as KubeRay has it"
    [usual] = free_ports(1)
    monkeypatch.setattr(serve_environment, "USUAL_METRICS_PORT", usual)
    assert metrics_port({}) == usual
    with socket.create_server(("127.0.0.1", usual)):
        assert metrics_port({}) not in (usual, 0)
        assert metrics_port({"EXPERTMESH_METRICS_PORT": "7"}) == 7


def test_free_ports_are_none_that_a_connection_may_take_meanwhile() -> None:
    """HAProxy once did not start: it listens seconds after its port was chosen, and something else had it by then."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(20000 <= port < low or port > high for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert set(free_ports(3000)).isdisjoint(ports[:1])


def test_free_ports_tell_when_there_are_too_few() -> None:
    with pytest.raises(OSError, match=r"only \d+ ports of range\(20000, \d+\) are free, expected 70000"):
        free_ports(70_000)
