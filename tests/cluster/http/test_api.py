"""Status, metrics and traces while routers are slow, dying or not there; and models that are not served."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentBroadcastResponse

from cluster.http.errors import OpenAIApp, add_error_handlers
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

ingress = pytest.importorskip("cluster.http.api", reason="ray.serve.llm needs vllm")

TIMEOUT_S = 0.2


class Replica:
    """A router that gives its answer, raises it, or (None) is silent."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def get_async(self) -> Any:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Ingress(ingress.ExpertMeshIngress):
    """The ingress of made-up routers; `replicas` may be why there are none."""

    def __init__(self, replicas: list[Any] | Exception) -> None:
        self._mesh = SimpleNamespace(
            routers=SimpleNamespace(trace_tokens=10),
            deadlines=SimpleNamespace(apply_s=TIMEOUT_S, probe_s=TIMEOUT_S - 5),
            http=SimpleNamespace(retry_after_s=3),
        )
        self._model_cards = {"tiny-moe": SimpleNamespace()}
        self._default_serve_handles = {"tiny-moe": SimpleNamespace(options=lambda **_: self.opened.append(1))}
        self._configured_serve_handles: dict[str, Any] = {}
        self.opened: list[int] = []
        self._replicas = replicas
        self._routers = self

    def broadcast(self, method: str) -> DeploymentBroadcastResponse:
        async def replicas() -> list[Any]:
            if isinstance(self._replicas, Exception):
                raise self._replicas
            return [Replica(answer) for answer in self._replicas]

        return DeploymentBroadcastResponse(replicas(), None)

    async def _controller_status(self) -> dict[str, Any]:
        return {"epoch": 7, "missing_ranks": [], "shards": []}


def get(mesh: Ingress, path: str, method: str = "GET") -> httpx.Response:
    """One request to an app with the routes and error handlers of the service."""

    async def run() -> httpx.Response:
        app = OpenAIApp()
        add_error_handlers(app, 3)
        for name, route in ingress.ENDPOINTS.items():
            if name in ("health", "metrics") or name.startswith("mesh"):
                route(app)(getattr(mesh, name))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh") as client:
            return await client.request(method, path)

    return run_async(run(), f"the answer to {method} {path}")


@pytest.fixture(autouse=True)
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "CONTROLLER_TIMEOUT_S", TIMEOUT_S)


def failed(cause: Exception) -> Exception:
    return RayTaskError("mesh_status", "a long\ntraceback", cause).as_instanceof_cause()


NO_ROUTER = DeploymentUnavailableError(DeploymentID("Router", "llm"))


@pytest.mark.parametrize(
    ("replicas", "names", "errors"),
    [
        ([router_status("a"), None], ["a"], ["a router did not answer mesh_status in 0.2 s"]),
        ([failed(KeyError("x")), router_status("b")], ["b"], ["a router failed at mesh_status: KeyError: 'x'"]),
        (NO_ROUTER, [], ["no router is available"]),
        (TimeoutError(), [], ["the routers did not answer mesh_status in 0.2 s"]),
        ([router_status("a"), router_status("b")], ["a", "b"], []),
    ],
)
def test_routers_that_do_not_answer_hide_nothing_else(
    replicas: list[Any] | Exception, names: list[str], errors: list[str]
) -> None:
    status = get(Ingress(replicas), "/expertmesh/status")
    assert status.status_code == 200, status.text
    body = status.json()
    assert [router["router_id"] for router in body["routers"]] == names
    assert (body["controller"]["epoch"], body["errors"]) == (7, errors)

    metrics = get(Ingress(replicas), "/metrics")
    assert metrics.status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(metrics.text)}
    assert [sample.labels["router"] for sample in families["expertmesh_epoch"].samples] == names
    assert families["expertmesh_controller_epoch"].samples[0].value == 7


@pytest.mark.parametrize(("method", "call"), [("GET", "mesh_trace"), ("DELETE", "mesh_clear_trace")])
@pytest.mark.parametrize(
    ("replicas", "told"),
    [([("a", b""), None], "a router did not answer {} in 0.2 s"), (NO_ROUTER, "no router is available")],
)
def test_what_needs_every_router_is_503_without_one(
    method: str, call: str, replicas: list[Any] | Exception, told: str
) -> None:
    response = get(Ingress(replicas), "/expertmesh/trace", method)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["message"] == told.format(call)


def test_health_tells_of_the_router_that_is_silent_and_of_the_others() -> None:
    response = get(Ingress([{"ok": True, "router_id": "a", "reason": ""}, None]), "/health")
    assert response.status_code == 503
    assert response.json()["reason"] == "a router did not answer generation_health in 0.2 s"
    assert [router["router_id"] for router in response.json()["routers"]] == ["a"]
    assert get(Ingress([{"ok": True, "router_id": "a", "reason": ""}]), "/health").status_code == 200


@pytest.mark.parametrize("model", ["other", "tiny-moe:x", "tiny-moe:", ":"])
def test_models_that_are_not_served_are_404_and_leave_nothing_behind(model: str) -> None:
    mesh = Ingress([])
    app = OpenAIApp()
    add_error_handlers(app, 3)

    @app.get("/ask")
    async def ask() -> None:
        async for _ in mesh._get_response(body=SimpleNamespace(model=model), call_method="completions"):
            pass

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://mesh") as client:
            return await client.get("/ask")

    response = run_async(run(), "the answer")
    assert response.status_code == 404, response.text
    assert f'Could not find base model with ID "{model}"' in response.json()["error"]["message"]
    assert (mesh._configured_serve_handles, mesh.opened) == ({}, [])
