"""What changes the service over HTTP: who may, what the controller is asked, and how a refusal looks."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from cluster.autopilot.messages import Decision
from cluster.config.apps import ConsoleAppConfig
from cluster.config.http_sections import ConsoleHttpSection
from cluster.console import operations
from cluster.console.endpoints import Console, console_app
from cluster.controller.client import ControllerLostError
from cluster.mesh.messages import HistoryEntry, PlacementView, PlanView
from placement.placement import Placement
from tests.support.serve.statuses import controller_status, migration_view
from tests.support.waiting import run_async

PLACEMENT = Placement.linear(2, 6, 3)
BODY = json.dumps(PLACEMENT.to_json())
ACCEPTED = PlanView(True, 7, 2, 5, {"node": 500, "checkpoint": 100}, 1.5, "")
HISTORY = [
    HistoryEntry(1, "first", 10.0, 12.5, "reached", 0, 0),
    HistoryEntry(2, "command", 20.0, None, "under way", 3, 9),
]
DECISIONS = [Decision(1, 15.0, "plan", "it pays", "helped", 2, predicted_gain=0.1)]
REFUSED = [("", 401, "invalid_api_key"), ("wrong", 401, "invalid_api_key"), ("reader", 403, "forbidden")]  # by key
CHANGES = [
    ("POST", "/placement"),
    ("POST", "/placement?dry_run=true"),
    ("POST", "/shards/1/drain"),
    ("POST", "/shards/1/undrain"),
    ("POST", "/migration/pause"),
    ("POST", "/migration/resume"),
]
READ, ADMIN = "reader", "admin"


@dataclass
class Controller:
    """A controller that notes what it is asked and answers as told; with `lost` it does not answer."""

    plan: PlanView = ACCEPTED
    why_not: str = ""
    has_target: bool = True
    lost: bool = False
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def _note(self, *call: Any) -> None:
        self.asked.append(call)
        if self.lost:
            raise ControllerLostError("the placement controller is away")

    async def apply(self, placement: Placement, dry_run: bool, *, timeout_s: float) -> PlanView:
        self._note("apply", placement, dry_run)
        return self.plan

    async def drain(self, rank: int, back: bool, *, timeout_s: float) -> str:
        self._note("drain", rank, back)
        return self.why_not

    async def pause(self, paused: bool, *, timeout_s: float) -> None:
        self._note("pause", paused)

    async def history(self, *, timeout_s: float) -> list[HistoryEntry]:
        self._note("history")
        return HISTORY

    async def decisions(self, *, timeout_s: float) -> list[Decision]:
        self._note("decisions")
        return DECISIONS

    async def placement(self, *, timeout_s: float) -> PlacementView:
        self._note("placement")
        return PlacementView(3, PLACEMENT, [], 6 * self.has_target, PLACEMENT if self.has_target else None)

    async def status(self, *, timeout_s: float) -> Any:
        self._note("status")
        return controller_status(migration=migration_view())


@dataclass
class Answer:
    status: int
    error: dict[str, Any]  # empty where there is none
    body: Any
    headers: httpx.Headers


def ask(
    controller: Controller,
    method: str,
    path: str,
    *,
    key: str = ADMIN,
    content: str | bytes = BODY,
    api_keys: tuple[str, ...] = (READ,),
    admin_keys: tuple[str, ...] = (ADMIN,),
) -> Answer:
    """One request below the route prefix that Serve gives the console."""
    http = ConsoleHttpSection(api_keys=list(api_keys), admin_keys=list(admin_keys), retry_after_s=3)
    client: Any = controller
    app = console_app(Console(ConsoleAppConfig(http=http), client, []))

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path="/expertmesh")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://mesh") as http_client:
            call = http_client.request(method, f"/expertmesh{path}", headers=headers, content=content)
            return await asyncio.wait_for(call, 30)

    response = run_async(run())
    body = response.json() if response.content else None
    error = body.get("error", {}) if isinstance(body, dict) else {}
    return Answer(response.status_code, error, body, response.headers)


# Who may --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_an_admin_key_changes_the_service_and_nothing_else_does(method: str, path: str) -> None:
    controller = Controller()
    for key, status, code in (
        ("", 401, "invalid_api_key"),
        ("wrong", 401, "invalid_api_key"),
        (READ, 403, "forbidden"),
    ):
        refused = ask(controller, method, path, key=key)
        assert (refused.status, refused.error.get("code")) == (status, code)
        assert refused.error.keys() == {"message", "type", "param", "code"}
        assert ("www-authenticate" in refused.headers) == (status == 401)
    assert controller.asked == []
    assert ask(controller, method, path, key=ADMIN).status in (200, 202)
    assert len(controller.asked) == 1


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize("api_keys", [(), (READ,)])
def test_without_admin_keys_nobody_changes_anything(method: str, path: str, api_keys: tuple[str, ...]) -> None:
    controller = Controller()
    refused = ask(controller, method, path, key=READ, api_keys=api_keys, admin_keys=())
    assert (refused.status, refused.error.get("code")) == (403, "no_admin_keys")
    assert "http.keys_file" in refused.error["message"]
    assert refused.error["type"] == "invalid_request_error"
    assert controller.asked == []


@pytest.mark.parametrize("path", ["/history", "/placement", "/placement/target", "/status", "/trace", "/nothing"])
@pytest.mark.parametrize("api_keys", [(), (READ,)])
def test_with_admin_keys_these_alone_see_the_service(path: str, api_keys: tuple[str, ...]) -> None:
    controller = Controller()
    for key in ("", "wrong", READ):
        status = 403 if key in api_keys else 401
        assert ask(controller, "GET", path, key=key, api_keys=api_keys).status == status
    assert controller.asked == []
    assert ask(controller, "GET", path, key=ADMIN, api_keys=api_keys).status not in (401, 403)


def test_without_admin_keys_whoever_comes_in_sees_the_service() -> None:
    assert ask(Controller(), "GET", "/history", key="", api_keys=(), admin_keys=()).status == 200
    assert ask(Controller(), "GET", "/history", key=READ, admin_keys=()).status == 200
    assert ask(Controller(), "GET", "/history", key="", admin_keys=()).status == 401


@pytest.mark.parametrize(
    ("admin_keys", "key", "status"),
    [((), READ, 503), ((ADMIN,), READ, 403), ((ADMIN,), ADMIN, 503), ((), "", 401), ((ADMIN,), "", 401)],
)
def test_clearing_the_trace_takes_an_admin_key_if_there_are_any(
    admin_keys: tuple[str, ...], key: str, status: int
) -> None:
    """503: it got through, and there is no router."""
    assert ask(Controller(), "DELETE", "/trace", key=key, admin_keys=admin_keys).status == status
    assert ask(Controller(), "DELETE", "/trace", key=key, api_keys=(), admin_keys=()).status == 503


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_what_is_no_endpoint_is_closed_as_well(method: str) -> None:
    assert ask(Controller(), method, "/status", key=READ).status == 403
    assert ask(Controller(), method, "/nowhere", key=ADMIN).status == 404


def test_every_route_that_does_more_than_read_is_among_those_tested() -> None:
    console: Any = Console(ConsoleAppConfig(), Controller(), [])  # type: ignore[arg-type]
    found = {
        (method, route.path)
        for route in console_app(console).routes
        for method in getattr(route, "methods", None) or ()
        if method not in ("GET", "HEAD")
    }
    tested = {(method, path.partition("?")[0].replace("/1/", "/{rank}/")) for method, path in CHANGES}
    assert found == {*tested, ("DELETE", "/trace")}


# What is asked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("query", "dry_run", "status"), [("", False, 202), ("?dry_run=true", True, 200)])
def test_a_placement_is_applied(query: str, dry_run: bool, status: int) -> None:
    controller = Controller()
    answer = ask(controller, "POST", f"/placement{query}")
    assert controller.asked == [("apply", PLACEMENT, dry_run)]
    assert (answer.status, answer.body) == (status, ACCEPTED.to_dict())


def test_the_placement_that_the_console_shows_can_be_applied() -> None:
    controller = Controller()
    shown = ask(controller, "GET", "/placement").body["placement"]
    assert ask(controller, "POST", "/placement", content=json.dumps(shown)).status == 202
    assert controller.asked[-1] == ("apply", PLACEMENT, False)


def test_target_and_history_are_the_controllers() -> None:
    target = ask(Controller(), "GET", "/placement/target")
    assert target.body == {"target_version": 6, "origin": "command", "target": PLACEMENT.to_json()}
    assert ask(Controller(), "GET", "/history").body == {
        "history": [entry.to_dict() for entry in HISTORY],
        "autopilot": [decision.to_dict() for decision in DECISIONS],
    }
    none_yet = ask(Controller(has_target=False), "GET", "/placement/target")
    assert (none_yet.status, none_yet.error.get("code")) == (404, "not_found")


def test_shards_are_drained_and_taken_back_and_moves_paused() -> None:
    controller = Controller()
    drained, back = (ask(controller, "POST", f"/shards/2/{verb}") for verb in ("drain", "undrain"))
    assert (drained.status, drained.body) == (202, {"rank": 2, "draining": True})
    assert (back.status, back.body) == (202, {"rank": 2, "draining": False})
    assert ask(controller, "POST", "/migration/pause").body == {"paused": True}
    assert ask(controller, "POST", "/migration/resume").body == {"paused": False}
    assert controller.asked == [("drain", 2, False), ("drain", 2, True), ("pause", True), ("pause", False)]


# What is refused ------------------------------------------------------------------------------------------------------


def changed(**keys: Any) -> str:
    return json.dumps({**PLACEMENT.to_json(), **keys})


def without(key: str) -> str:
    return json.dumps({name: value for name, value in PLACEMENT.to_json().items() if name != key})


MAP = "physical_to_logical_map"


@pytest.mark.parametrize(
    ("content", "param", "code", "told"),
    [
        ("", None, "invalid_json", "is not JSON"),
        ("{", None, "invalid_json", "is not JSON"),
        (b"\xff\xfe", None, "invalid_json", "is not JSON"),
        ("[" * 100_000, None, "invalid_json", "is not JSON"),
        ("3", None, "invalid_value", "a placement is a JSON object, got int"),
        ("{}", "num_ranks", "invalid_value", "the placement has no 'num_ranks'"),
        (without("num_ranks"), "num_ranks", "invalid_value", "has no 'num_ranks'"),
        (without(MAP), MAP, "invalid_value", f"has no '{MAP}'"),
        (changed(num_ranks="3"), "num_ranks", "invalid_value", "num_ranks is '3', expected an integer"),
        (changed(num_ranks=0), "num_ranks", "invalid_value", "num_ranks is 0, expected at least 1"),
        (changed(num_nodes=2), "num_nodes", "invalid_value", "3 ranks cannot be dealt evenly to 2 nodes"),
        (changed(num_experts=True), "num_experts", "invalid_value", "num_experts is True"),
        (changed(nodes=[0]), "nodes", "invalid_value", "nodes are [0]"),
        (changed(nodes="a"), "nodes", "invalid_value", "nodes is 'a'"),
        (changed(partial=1), "partial", "invalid_value", "partial is 1, expected true or false"),
        (changed(**{MAP: []}), MAP, "invalid_value", f"{MAP} is empty"),
        (changed(**{MAP: [[0, 1], [0]]}), MAP, "invalid_value", f"{MAP} is ragged"),
        (changed(**{MAP: "abc"}), MAP, "invalid_value", f"{MAP} must be integers"),
        (changed(**{MAP: {"a": 1}}), MAP, "invalid_value", f"{MAP} must be integers"),
        (changed(**{MAP: [[0, 1, 2, 3, 4, 99]]}), MAP, "invalid_value", "slot 5 holds expert 99"),
        (changed(**{MAP: [[0, 1, 2, 3, 4, 4]]}), MAP, "invalid_value", "layer 0: expert 5 has no slot"),
        (changed(**{MAP: [[0, 1, 2, 3, 4]]}), MAP, "invalid_value", "5 slots cannot be dealt evenly to 3 ranks"),
        (changed(**{MAP: [[2**70]]}), MAP, "invalid_value", MAP),
    ],
)
def test_a_body_that_is_no_placement_is_refused_by_key(
    content: str | bytes, param: str | None, code: str, told: str
) -> None:
    controller = Controller()
    answer = ask(controller, "POST", "/placement", content=content)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == (param, code)
    assert told in answer.error["message"]
    assert controller.asked == []


def test_a_body_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_PLACEMENT_BYTES", 1000)
    answer = ask(Controller(), "POST", "/placement", content=" " * 1001)
    assert (answer.status, answer.error.get("code")) == (413, "request_too_large")


@pytest.mark.parametrize("query", ["", "?dry_run=1"])
def test_a_placement_that_does_not_fit_is_a_conflict_with_the_controllers_reason(query: str) -> None:
    refused = PlanView(False, 0, 0, 0, {}, 0.0, "it needs 9 slots in a layer of rank 0, whose shard has 8")
    answer = ask(Controller(plan=refused), "POST", f"/placement{query}")
    assert answer.status == 409
    assert answer.error == {
        "message": "the placement does not fit: it needs 9 slots in a layer of rank 0, whose shard has 8",
        "type": "invalid_request_error",
        "param": None,
        "code": "placement_refused",
    }


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_a_drain_that_is_refused_is_a_conflict_with_the_controllers_reason(verb: str) -> None:
    answer = ask(Controller(why_not="no shard serves at rank 9; there are [0, 1]"), "POST", f"/shards/9/{verb}")
    assert (answer.status, answer.error.get("param")) == (409, "rank")
    assert answer.error.get("message") == "no shard serves at rank 9; there are [0, 1]"


@pytest.mark.parametrize(
    ("path", "param"),
    [("/shards/first/drain", "rank"), ("/shards/1.5/undrain", "rank"), ("/placement?dry_run=x", "dry_run")],
)
def test_a_path_or_query_that_is_no_number_or_flag_is_named(path: str, param: str) -> None:
    controller = Controller()
    answer = ask(controller, "POST", path)
    assert (answer.status, answer.error.get("param")) == (400, param)
    assert controller.asked == []


@pytest.mark.parametrize(
    ("method", "path"), [*CHANGES, ("GET", "/history"), ("GET", "/placement"), ("GET", "/placement/target")]
)
def test_without_the_controller_it_is_unavailable(method: str, path: str) -> None:
    answer = ask(Controller(lost=True), method, path)
    assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    assert answer.error.get("message") == "the placement controller is away"
