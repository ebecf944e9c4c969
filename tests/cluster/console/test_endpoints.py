"""Status, metrics and placement while routers or the controller are slow, dying or not there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.config.apps import ConsoleAppConfig
from cluster.config.http_sections import ConsoleHttpSection
from cluster.console import endpoints
from cluster.console.endpoints import Console, console_app
from cluster.controller.client import ControllerLostError
from cluster.mesh.messages import PlacementView
from cluster.router.client import RouterClient
from cluster.router.messages import TraceSample
from placement.placement import Placement
from tests.support.router_handle import RouterHandle
from tests.support.serve.statuses import controller_status, router_status
from tests.support.waiting import run_async

TIMEOUT_S = 0.2
NO_ROUTER = DeploymentUnavailableError(DeploymentID("Router", "llm"))
PLACEMENT = PlacementView(3, Placement.linear(1, 2, 2), [[[0]], [[1]]], 0, None)


class Controller:
    """A controller that answers, or (lost) does not."""

    def __init__(self, lost: bool = False) -> None:
        self._lost = lost

    async def status(self, timeout_s: float) -> Any:
        return self._answer(controller_status())

    async def placement(self, timeout_s: float) -> Any:
        return self._answer(PLACEMENT)

    def _answer(self, answer: Any) -> Any:
        if self._lost:
            raise ControllerLostError("the placement controller is away")
        return answer


def get(
    path: str,
    replicas: list[Any] | Exception = NO_ROUTER,
    method: str = "GET",
    controller_lost: bool = False,
    keys: tuple[str, ...] = (),
    key: str = "",
    origins: tuple[str, ...] = (),
) -> httpx.Response:
    """One request to the app of a console replica, below the route prefix that Serve gives it."""
    config = ConsoleAppConfig(
        http=ConsoleHttpSection(retry_after_s=3, admin_keys=list(keys), cors_origins=list(origins))
    )
    controller: Any = Controller(controller_lost)
    handle: Any = RouterHandle(replicas)
    app = console_app(Console(config, controller, [RouterClient(handle)]))

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path="/expertmesh")
        headers = {"Authorization": f"Bearer {key}", "Origin": "http://elsewhere"}
        async with httpx.AsyncClient(transport=transport, base_url="http://mesh") as client:
            return await asyncio.wait_for(client.request(method, path, headers=headers), 30)

    return run_async(run())


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "STATUS_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(endpoints, "TRACE_TIMEOUT_S", TIMEOUT_S)


def test_every_endpoint_needs_the_key() -> None:
    replicas = [router_status("a")]
    for path in ("/expertmesh/status", "/expertmesh/placement", "/expertmesh/trace"):
        assert get(path, replicas, keys=("secret",)).status_code == 401
        assert get(path, replicas, keys=("secret",), key="secret").status_code != 401


@pytest.mark.parametrize(
    ("origins", "allowed"), [((), None), (("http://elsewhere",), "http://elsewhere"), (("*",), "*")]
)
def test_pages_of_other_origins_read_nothing_unless_they_are_named(
    origins: tuple[str, ...], allowed: str | None
) -> None:
    status = get("/expertmesh/status", [router_status("a")], origins=origins)
    assert status.headers.get("access-control-allow-origin") == allowed


@pytest.mark.parametrize(
    ("replicas", "names", "errors"),
    [
        ([router_status("a"), None], ["a"], ["a router did not answer mesh_status in 0.2 s"]),
        (NO_ROUTER, [], ["no router is available"]),
        ([router_status("a"), router_status("b")], ["a", "b"], []),
    ],
)
def test_routers_that_do_not_answer_hide_nothing_else(
    replicas: list[Any] | Exception, names: list[str], errors: list[str]
) -> None:
    status = get("/expertmesh/status", replicas)
    assert status.status_code == 200, status.text
    body = status.json()
    assert [router["router_id"] for router in body["routers"]] == names
    assert (body["controller"]["epoch"], body["errors"]) == (5, errors)


def test_the_status_is_what_each_process_reports() -> None:
    body = get("/expertmesh/status", [router_status("a")]).json()
    as_json = json.loads(json.dumps([controller_status().to_dict(), router_status("a").to_dict()]))
    assert body == {"controller": as_json[0], "routers": [as_json[1]], "errors": []}


def test_a_controller_that_is_away_hides_no_router() -> None:
    body = get("/expertmesh/status", [router_status("a"), None], controller_lost=True).json()
    assert body["controller"] is None
    assert [router["router_id"] for router in body["routers"]] == ["a"]
    assert body["errors"] == [
        "a router did not answer mesh_status in 0.2 s",
        "the placement controller does not answer",
    ]


def test_the_placement_is_the_controllers() -> None:
    assert get("/expertmesh/placement").json() == PLACEMENT.to_dict()
    response = get("/expertmesh/placement", controller_lost=True)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["message"] == "the placement controller is away"


@pytest.mark.parametrize(("method", "call"), [("GET", "mesh_trace"), ("DELETE", "mesh_clear_trace")])
@pytest.mark.parametrize(
    ("replicas", "told"),
    [([TraceSample("a", b""), None], "a router did not answer {} in 0.2 s"), (NO_ROUTER, "no router is available")],
)
def test_what_needs_every_router_is_503_without_one(
    method: str, call: str, replicas: list[Any] | Exception, told: str
) -> None:
    response = get("/expertmesh/trace", replicas, method)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["message"] == told.format(call)


def test_clearing_the_trace_answers_with_nothing() -> None:
    response = get("/expertmesh/trace", [True], "DELETE")
    assert (response.status_code, response.content) == (204, b"")
