"""`expertmesh status`: rates against counters made by hand, reasons for not being well, and a server that answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.mesh.messages import ControllerStatus
from cluster.serve_environment import free_ports
from cluster.status_command.look import Answer, Look
from cluster.status_command.report import problems, report
from cluster.status_command.screen import lines, screen
from experts.protocol.status import RouterStatus
from tests.support.command import run_here
from tests.support.serve.statuses import controller_status, migration_view, router_status, seat_view
from tests.support.waiting import join

WELL = Answer(200, {"status": "ok", "reason": ""})


def told(of: RouterStatus, controller: ControllerStatus | None, errors: list[str] | None = None) -> dict[str, Any]:
    """As it comes over HTTP."""
    plain = {
        "controller": None if controller is None else controller.to_dict(),
        "routers": [of.to_dict()],
        "errors": errors or [],
    }
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def router(**changes: Any) -> RouterStatus:
    """One that has lost no shard."""
    return router_status(lost={}, **changes)


def sound() -> ControllerStatus:
    return controller_status(
        complete=True,
        missing_ranks=[],
        shards=[seat_view(0, state="serving"), seat_view(1, state="serving")],
        migration=migration_view(unserved=0),
    )


def test_a_sound_service_has_no_problem() -> None:
    """Nor one whose third shard has left for good, and with it a rank between others."""
    left = {2: "no shard has this rank yet"}
    for of in (router(), router_status(lost=left)):
        assert list(problems(Look(0.0, WELL, told(of, sound())))) == []


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (Look(0.0, Answer(503, {"reason": "no shard"}), told(router(), sound())), "/health: status 503: no"),
        (Look(0.0, Answer(200, {"status": "degraded", "reason": "r2: x"}), told(router(), sound())), "r2: x"),
        (Look(0.0, Answer(0, "timed out"), told(router(), sound())), "/health: timed out"),
        (Look(0.0, WELL, None, "the console is away"), "the console is away"),
        (Look(0.0, WELL, told(router_status(), sound())), "router r1 has no link to rank 0: gone"),
        (Look(0.0, WELL, told(router(), None, ["no controller answers"])), "no controller"),
        (Look(0.0, WELL, told(router(), controller_status())), "no shard at rank 0"),
        (Look(0.0, WELL, told(router(), controller_status())), "5 experts of a layer are served by no"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_line(look: Look, expected: str) -> None:
    found = list(problems(look))
    assert [line for line in found if expected in line], found


@pytest.mark.parametrize(("layers", "dispatches"), [(4, 40), (5, 40)])
def test_rates_are_differences_of_counters(layers: int, dispatches: int) -> None:
    """Worked by hand: 400 rows in 4 layers are 100 tokens, in 2 s; 600 visits of 400 rows. A router that does not guess
    does not go through the layer for guesses."""
    before = Look(10.0, WELL, told(router(layers=layers), sound()))
    changed = {"rows": 480, "fan_out_sum": 720, "shard_rows": [130, 50]}
    later = router(layers=layers, steps=20, dispatches=40 + dispatches, **changed)
    now = report("url", Look(12.0, WELL, told(later, sound())), before)
    assert now["tokens_per_s"] == 50.0
    assert now["routers"][0]["fan_out"] == 1.5
    assert [shard["rows_per_s"] for shard in now["shards"]] == [50.0, 0.0]
    assert now["over_s"] == 2.0


@pytest.mark.parametrize("change", [{"pid": 10}, {"rows": 0, "fan_out_sum": 0, "shard_rows": [0, 0]}])
def test_a_router_that_restarted_has_no_rate(change: dict[str, Any]) -> None:
    before = Look(10.0, WELL, told(router(), sound()))
    now = report("url", Look(12.0, WELL, told(router(**change), sound())), before)
    assert now["tokens_per_s"] is None
    assert now["shards"][0]["rows_per_s"] is None
    assert report("url", before)["tokens_per_s"] is None


def test_the_screen_says_states_in_words_and_in_colours() -> None:
    status = report("http://x", Look(0.0, WELL, told(router_status(), controller_status())))
    text = screen(status)
    assert text.plain == "\n".join(lines(status))
    for part in ("http://x  NOT HEALTHY", "epoch       5; target 6 (command)", "copying, 9 copies left", "joining"):
        assert part in text.plain
    assert {str(span.style) for span in text.spans} >= {"yellow", "bold red"}


class Service:
    """A server that answers as a service does; each look finds more rows."""

    def __init__(self) -> None:
        self.looks = 0
        self.key = ""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = service.answer(self.path, self.headers.get("Authorization", ""))
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, authorization: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, {"status": "ok"}
        if path != "/expertmesh/status":
            return 404, {"error": {"message": "unknown"}}
        if self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": "no key"}}
        self.looks += 1
        grown = {"steps": 10 + 100 * self.looks, "dispatches": 40 + 400 * self.looks, "rows": 80 + 400 * self.looks}
        return 200, told(router(**grown), sound())


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever)
    thread.start()
    yield service
    service.server.shutdown()
    join(thread, "the server to stop")
    service.server.server_close()


def test_one_look(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("status", f"{service.url}/v1", "--sample-s", "0.01", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is True
    assert document["tokens_per_s"] > 0
    assert run_here("status", service.url, "--sample-s", "0") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{service.url}  healthy\n")
    assert "\x1b" not in out
    assert service.looks == 3


def test_it_is_watched_look_after_look(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    watch = ("status", service.url, "--watch", "--interval-s", "0.1", "--looks", "2")
    assert run_here(*watch, "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["tokens_per_s"] is None
    assert second["tokens_per_s"] > 0
    assert run_here(*watch) == 0
    assert capsys.readouterr().out.count(f"{service.url}  healthy") == 2


def test_a_key_is_asked_for_and_sent(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service.key = "sk-admin"
    assert run_here("status", service.url, "--sample-s", "0") == 1
    assert "status 401, no key; give an admin key: --api-key" in capsys.readouterr().out
    monkeypatch.setenv("EXPERTMESH_API_KEY", "sk-admin")
    assert run_here("status", service.url, "--sample-s", "0") == 0


def test_a_console_elsewhere(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("status", service.url, "--console-path", "/other", "--sample-s", "0") == 1
    assert "/other/status: status 404, unknown; --console-path says where" in capsys.readouterr().out


@pytest.mark.parametrize("more", [(), ("--watch", "--looks", "1")])
def test_nothing_there_is_status_3(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert run_here("status", url, *more) == 3
    captured = capsys.readouterr()
    assert f"nothing answers at {url}: " in captured.out + captured.err
