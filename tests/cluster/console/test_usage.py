"""/expertmesh/usage and the series of keys: who sees what, and what is known when routers or the ledger are away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.config.apps import ConsoleAppConfig
from cluster.config.http_sections import ConsoleHttpSection
from cluster.console import usage
from cluster.console.endpoints import Console, console_app
from cluster.controller.client import ControllerLostError
from cluster.keys.command import line_of
from cluster.keys.deployment import KeyLedger
from cluster.keys.leases import RouterKeys
from cluster.keys.messages import Report, Totals
from cluster.router.client import RouterClient
from tests.support.router_handle import RouterHandle
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

NO_ROUTER = DeploymentUnavailableError(DeploymentID("Router", "llm"))
ADMIN, TEAM, IDLE = "sk-admin", "sk-team", "sk-idle"
FIRST = RouterKeys("r1", {"team": Totals(3, 30, 12, refused=1), "other": Totals(1, 5, 6)}, "leases", "")
SECOND = RouterKeys("r2", {"team": Totals(4, 40, 13)}, "shares", "http.keys_file /keys is no YAML")
BOTH = {"requests": 7, "prompt_tokens": 70, "completion_tokens": 25, "refused": 1}
NOTHING = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "refused": 0}


class Controller:
    """Is away: nothing here is asked of it but metrics, which do without."""

    async def status(self, *, timeout_s: float) -> Any:
        raise ControllerLostError("the placement controller is away")


@dataclass
class Applications:
    """A console with the routers and the ledger of each of some applications."""

    file: Path
    routers: Sequence[Any] = ([FIRST, SECOND],)
    ledgers: list[Any] = field(default_factory=list)
    admins: bool = True

    def get(self, path: str, key: str = "") -> httpx.Response:
        lines = [line_of(TEAM, name="team"), line_of(IDLE, name="idle")]
        lines += [line_of(ADMIN, name="ops", role="admin")] * self.admins
        self.file.write_text("\n".join(lines))
        controller: Any = Controller()
        handles: list[Any] = [RouterHandle([router_status("r1")], {"mesh_keys": one}) for one in self.routers]
        config = ConsoleAppConfig(http=ConsoleHttpSection(keys_file=str(self.file)))
        app = console_app(Console(config, controller, [RouterClient(one) for one in handles], self.ledgers))

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app, root_path="/expertmesh")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with httpx.AsyncClient(transport=transport, base_url="http://mesh") as client:
                return await asyncio.wait_for(client.get(f"/expertmesh{path}", headers=headers), 30)

        return run_async(run())


@dataclass
class LedgerHandle:
    """Serve's handle of a ledger that has heard of some routers, or raises, or (silent) does not answer."""

    routers: Sequence[RouterKeys] = ()
    error: Exception | None = None
    silent: bool = False
    asked: int = 0

    @property
    def usage(self) -> Any:
        return SimpleNamespace(remote=self._usage)

    async def _usage(self) -> Any:
        self.asked += 1
        if self.silent:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        ledger = KeyLedger()
        for one in self.routers:
            await ledger.settle(Report(one.router_id, 1, usage=one.usage))
        return await ledger.usage()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "ROUTERS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(usage, "LEDGER_TIMEOUT_S", 0.05)


def test_an_admin_sees_the_usage_of_all_keys_at_all_routers(file: Path) -> None:
    ledger = LedgerHandle([FIRST])
    body = Applications(file, ledgers=[ledger]).get("/usage", ADMIN).json()
    assert body["keys"] == {
        "other": {"requests": 1, "prompt_tokens": 5, "completion_tokens": 6, "refused": 0},
        "team": BOTH,
    }
    assert body["routers"] == {
        "r1": {"limits_by": "leases", "problem": ""},
        "r2": {"limits_by": "shares", "problem": "http.keys_file /keys is no YAML"},
    }
    assert (body["complete"], body["errors"]) == (True, [])
    assert body["since"].endswith("+00:00")


@pytest.mark.parametrize(("key", "name", "used"), [(TEAM, "team", BOTH), (IDLE, "idle", NOTHING)])
def test_a_client_sees_its_own_usage_and_nothing_of_others_or_of_hosts(
    file: Path, key: str, name: str, used: dict[str, int]
) -> None:
    body = Applications(file, ledgers=[LedgerHandle()]).get("/usage", key).json()
    assert body.keys() == {"since", "complete", "keys"}
    assert body["keys"] == {name: used}


@pytest.mark.parametrize("key", ["", "sk-other"])
def test_without_a_key_nobody_sees_usage(file: Path, key: str) -> None:
    assert Applications(file).get("/usage", key).status_code == 401


@pytest.mark.parametrize(("admins", "code"), [(True, "forbidden"), (False, "no_admin_keys")])
def test_a_client_of_a_list_of_keys_never_sees_the_service(file: Path, admins: bool, code: str) -> None:
    for path in ("/status", "/placement", "/history", "/trace"):
        refused = Applications(file, admins=admins).get(path, TEAM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)


def test_what_a_router_says_is_newer_than_what_the_ledger_heard_of_it(file: Path) -> None:
    old = RouterKeys("r1", {"team": Totals(1, 1, 1)}, "leases", "")
    gone = RouterKeys("r0", {"team": Totals(10, 100, 50)}, "leases", "")
    body = Applications(file, ledgers=[LedgerHandle([old, gone])]).get("/usage", TEAM).json()
    assert body["keys"]["team"] == {"requests": 17, "prompt_tokens": 170, "completion_tokens": 75, "refused": 1}


def test_without_any_router_the_ledger_tells_what_it_heard(file: Path) -> None:
    body = Applications(file, [NO_ROUTER], [LedgerHandle([FIRST])]).get("/usage", ADMIN).json()
    assert body["keys"]["team"]["requests"] == 3
    assert (body["complete"], body["errors"], body["routers"]) == (False, ["no router is available"], {})


@pytest.mark.parametrize("ledger", [LedgerHandle(silent=True), LedgerHandle(error=NO_ROUTER)], ids=["silent", "gone"])
def test_without_the_ledger_routers_tell_what_they_know(file: Path, ledger: LedgerHandle) -> None:
    body = Applications(file, ledgers=[ledger]).get("/usage", ADMIN).json()
    assert body["keys"]["team"] == BOTH
    assert (body["since"], body["complete"]) == (None, False)
    assert body["errors"] == ["the ledger of keys does not answer"]


def test_of_several_applications_those_without_names_of_keys_have_no_ledger_to_ask(file: Path) -> None:
    bare, named = LedgerHandle(error=NO_ROUTER), LedgerHandle([SECOND])
    routers = [[RouterKeys("r9", {}, "nothing", "")], [SECOND]]
    body = Applications(file, routers, [bare, named]).get("/usage", ADMIN).json()
    assert body["complete"]
    assert (bare.asked, named.asked) == (0, 1)
    assert body["keys"]["team"]["requests"] == 4


def test_applications_that_count_together_are_asked_once_and_counted_once(file: Path) -> None:
    """The ledger tells of routers of other consoles too."""
    elsewhere = RouterKeys("r7", {"team": Totals(10, 100, 50)}, "leases", "")
    ledger = LedgerHandle([FIRST, elsewhere])
    body = Applications(file, [[FIRST], [SECOND]], [ledger, ledger]).get("/usage", ADMIN).json()
    assert ledger.asked == 1
    assert body["complete"]
    assert body["keys"]["team"]["requests"] == 3 + 4 + 10
