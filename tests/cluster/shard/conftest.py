"""Plays scenes with a shard's deployment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.support.shard_scene import QUICK, Cluster, PlayShard
from tests.support.waiting import run_async


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> PlayShard:
    """Runs one scene."""

    def run(act: Callable[[Cluster], Awaitable[None]]) -> None:
        async def whole() -> None:
            cluster = Cluster(monkeypatch)
            await cluster.scene.restart(QUICK)
            try:
                await act(cluster)
            finally:
                await cluster.end()

        run_async(whole(), "the scene to end")

    return run
