"""Plays scenes with a placement controller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.support.controller_scene import Play, Scene
from tests.support.waiting import run_async


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs one scene, from a cold start."""

    def run(act: Callable[[Scene], Awaitable[None]]) -> None:
        async def whole() -> None:
            scene = Scene(monkeypatch)
            await scene.restart()
            try:
                await act(scene)
            finally:
                await scene.end()

        run_async(whole(), "the scene to end")

    return run
