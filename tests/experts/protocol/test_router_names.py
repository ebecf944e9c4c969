"""Names of a router's processes at shards."""

from __future__ import annotations

import pytest

from experts.protocol.router_names import process_name, router_of


@pytest.mark.parametrize("router_id", ["a1b2", "router-17-3fa9c1", "a#b", "#", "7"])
@pytest.mark.parametrize("worker", [0, 1, 15])
def test_a_router_is_known_by_each_of_its_processes(router_id: str, worker: int) -> None:
    assert router_of(process_name(router_id, worker)) == router_id


def test_processes_of_a_router_have_different_names() -> None:
    assert len({process_name("a1b2", worker) for worker in range(8)}) == 8
