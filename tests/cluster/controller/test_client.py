"""How the controller is called: what is raised when it does not answer, and through a restart."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.config.parse import ConfigError
from cluster.controller import client as client_module
from cluster.controller.client import ControllerClient, ControllerGoneError, ControllerLostError
from cluster.mesh.messages import HeartbeatAnswer, JoinRequest, Times
from tests.support.waiting import run_async

REQUEST = JoinRequest("s", "n", 0)
SILENCE = object()


class Handle:
    """Serve's handle of a controller that gives one of `answers` to each call: raises it, or is silent."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        async def answer(*args: Any) -> Any:
            self.calls.append((method, *args))
            answer = self.answers.pop(0)
            if answer is SILENCE:
                await asyncio.Event().wait()
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(remote=answer)


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from answers to (client, handle)."""

    def make(*answers: Any) -> tuple[ControllerClient, Handle]:
        handle = Handle(*answers)
        monkeypatch.setattr(client_module, "deployment_handle", lambda *_: handle)
        return ControllerClient("experts"), handle

    return make


def run(coroutine: Any) -> Any:
    return run_async(asyncio.wait_for(coroutine, 30))


def test_each_call_reaches_the_method_of_its_name(controller: Any) -> None:
    answer = HeartbeatAnswer(True, 3, Times(1, 5, 3))
    client, handle = controller(answer, True, None)
    assert run(client.heartbeat("s", None, timeout_s=5)) == answer
    assert run(client.leave("s", timeout_s=5)) is True
    assert run(client.deregister_router("r", timeout_s=5)) is None
    assert handle.calls == [("heartbeat", "s", None), ("leave", "s", 5), ("deregister_router", "r")]


def test_silence_and_failures_are_one_error_that_says_what_was_asked(controller: Any) -> None:
    client, _ = controller(SILENCE, KeyError("seat"))
    with pytest.raises(ControllerLostError, match=r"application 'experts' did not answer report in 0\.05 s"):
        run(client.report(None, timeout_s=0.05))  # type: ignore[arg-type]
    with pytest.raises(ControllerLostError, match=r"leave of .* application 'experts' failed: KeyError\('seat'\)"):
        run(client.leave("s", timeout_s=5))


def test_a_deleted_deployment_is_told_from_one_that_restarts(controller: Any) -> None:
    client, _ = controller(DeploymentUnavailableError(DeploymentID("PlacementController", "experts")), RuntimeError())
    with pytest.raises(ControllerGoneError, match="'experts' has no placement controller any more"):
        run(client.heartbeat("s", None, timeout_s=5))
    with pytest.raises(ControllerLostError) as told:
        run(client.heartbeat("s", None, timeout_s=5))
    assert not isinstance(told.value, ControllerGoneError)


def test_a_call_with_retry_outlives_a_restart(controller: Any) -> None:
    died = RuntimeError("the actor died")
    client, handle = controller(died, died, "rank")
    assert run(client.call_with_retry("join", REQUEST, timeout_s=20, pause_s=0.001)) == "rank"
    assert handle.calls == [("join", REQUEST)] * 3


def test_a_call_with_retry_ends_with_its_time(controller: Any) -> None:
    client, handle = controller(RuntimeError("the actor died"), "too late")
    with pytest.raises(ControllerLostError, match="the actor died"):
        run(client.call_with_retry("join", REQUEST, timeout_s=0.4, pause_s=0.5))
    assert len(handle.calls) == 1


@pytest.mark.parametrize("retry", [True, False])
def test_join_asks_again_only_if_told_to(controller: Any, retry: bool) -> None:
    client, handle = controller(RuntimeError("the actor died"), "rank")
    if retry:
        assert run(client.join(REQUEST, timeout_s=20)) == "rank"
    else:
        with pytest.raises(ControllerLostError):
            run(client.join(REQUEST, timeout_s=20, retry=False))
    assert len(handle.calls) == 1 + retry


def test_an_application_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="has no name"):
        ControllerClient("")


def test_a_leaving_shard_gives_the_controller_its_time_and_two_seconds_to_say_so(controller: Any) -> None:
    client, handle = controller(SILENCE)
    with pytest.raises(ControllerLostError, match=r"did not answer leave in 2\.0[0-9]* s"):
        run(client.leave("s", timeout_s=0.01))
    assert handle.calls == [("leave", "s", 0.01)]
