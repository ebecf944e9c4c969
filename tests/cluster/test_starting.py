"""How the command ends when Ray or Serve refuse: with their reason, in one line. Serve is faked here."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.exceptions import RayActorError

from cluster import ray_joints, start_up
from cluster import serving as command
from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from cluster.serving import Options
from cluster.start_up import ServeFailedError, StartUp, ask, reason_of
from tests.support.serve.statuses import controller_status

TINY = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"


@pytest.fixture
def config() -> MeshConfig:
    return MeshConfig.from_file(TINY)


def options(address: str | None = None) -> Options:
    return Options(config=str(TINY), port=None, address=address, timeout_s=5.0, verbose=True)


class FakeServe:
    """Serve and Ray as the command sees them; `fails` says which call raises what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: dict[str, Exception]) -> None:
        self.calls: list[str] = []
        self._fails = fails
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        for owner, name in (
            (ray, "init"),
            (ray, "shutdown"),
            (serve, "start"),
            (ray_joints, "delete_applications"),
            (ray_joints, "deploy_config"),
        ):
            monkeypatch.setattr(owner, name, self._stand_in(name))
        monkeypatch.setattr(ray, "is_initialized", lambda: "shutdown" not in self.calls)
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)

    def _stand_in(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            self.calls.append(name)
            if name in self._fails:
                raise self._fails[name]

        return call


@pytest.mark.parametrize(
    ("where", "error", "expected"),
    [
        ("start", TimeoutError("HTTP proxies not available\nafter 60 s."), r"Serve does not start with .*after 60 s"),
        ("start", ValueError("1 validation error for HTTPOptions"), r"Serve does not start with .*HTTPOptions"),
        ("deploy_config", ValueError("1 validation error\nfor Schema"), r"does not accept the config: 1 .* for Schema"),
        ("init", ConnectionError("Could not find any running Ray"), r"no Ray cluster answers at 10\.0\.0\.1:6379: C"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, where: str, error: Exception, expected: str
) -> None:
    FakeServe(monkeypatch, {where: error})
    with pytest.raises(ServeFailedError, match=expected) as caught, command.serving(config, options("10.0.0.1:6379")):
        pytest.fail("it serves")
    assert "\n" not in str(caught.value)


def test_a_failing_clean_up_hides_neither_the_reason_nor_the_rest(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeServe(monkeypatch, {"delete_applications": RayActorError()})
    with pytest.raises(ServeFailedError, match="the reason"), command.serving(config, options()):
        raise ServeFailedError("the reason")
    assert fake.calls[-2:] == ["delete_applications", "shutdown"]
    assert "not everything was deleted" in capsys.readouterr().out


def test_a_placement_that_does_not_fit_is_reported(monkeypatch: pytest.MonkeyPatch, config: MeshConfig) -> None:
    section = config.live.placement.model_copy(update={"num_nodes": 2})
    live = config.live.model_copy(update={"placement": section})
    FakeServe(monkeypatch, {})
    with (
        pytest.raises(ConfigError, match=r"placement\.num_nodes is 2, but 3 shards cannot be dealt evenly"),
        command.serving(config.model_copy(update={"live": live}), options()),
    ):
        pytest.fail("it serves")


def application(status: str, message: str = "", **deployments: Any) -> SimpleNamespace:
    return SimpleNamespace(status=status, message=message, deployments=deployments)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (application("DEPLOY_FAILED", "placement: it is for 16 experts"), "experts: placement: it is for 16 experts"),
        (
            application(
                "DEPLOY_FAILED",
                "The deployments ['B'] are DEPLOY_FAILED",
                A=SimpleNamespace(status="HEALTHY", message="", replica_states={"RUNNING": 1}),
                B=SimpleNamespace(status="DEPLOY_FAILED", message="no room", replica_states={}),
            ),
            "experts/B: no room",
        ),
    ],
)
def test_an_application_that_serve_gave_up_on_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, experts: SimpleNamespace, expected: str
) -> None:
    status = SimpleNamespace(applications={"experts": experts, "llm": application("DEPLOYING")})
    monkeypatch.setattr(serve, "status", lambda: status)
    with pytest.raises(ServeFailedError, match=expected):
        StartUp(config, print).wait_until_ready("http://127.0.0.1:1", timeout_s=5.0)


@pytest.mark.parametrize(
    ("refusal", "complete", "expected"),
    [
        ("shard 1: slots_per_rank is 4", False, "^experts: shard 1: slots_per_rank is 4$"),
        ("shard 1: slots_per_rank is 4", True, "no token after"),  # the others serve
        ("", False, "no token after"),
    ],
)
def test_shards_that_cannot_start_end_the_wait(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, refusal: str, complete: bool, expected: str
) -> None:
    controller = SimpleNamespace(status="HEALTHY", message="", replica_states={"RUNNING": 1})
    experts = application("DEPLOYING", PlacementController=controller)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"experts": experts}))
    status = controller_status(refusal=refusal, complete=complete)
    answer = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda timeout_s: status))
    monkeypatch.setattr(serve, "get_app_handle", lambda name: SimpleNamespace(status=answer))
    monkeypatch.setattr(start_up, "POLL_PERIOD_S", 0.01)
    with pytest.raises(ServeFailedError, match=expected):
        StartUp(config, print).wait_until_ready("http://127.0.0.1:1", timeout_s=5.0 if "shard" in expected else 0.05)


@contextmanager
def no_http_server() -> Iterator[str]:
    """A port that answers, but not in HTTP."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.connection.settimeout(10)
            self.connection.recv(4096)
            self.wfile.write(b"not http\r\n\r\n")
            self.close_connection = True

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/health"


def test_an_answer_that_is_not_http_is_not_healthy() -> None:
    with no_http_server() as url:
        ready, answer = ask(url)
        assert (ready, reason_of(answer)) == (False, "not http\r\n")


@pytest.mark.parametrize(
    ("app", "section", "key", "expected"),
    [
        (1, "routers", "engine_kwargs", r"llm\.routers\.engine_kwargs\.tipo is no engine option"),
        (0, "shards", "deployment_config", r"experts\.shards\.deployment_config\.tipo is no option of a Serve"),
    ],
)
def test_what_the_builders_would_refuse_is_refused_before_ray_is_started(
    monkeypatch: pytest.MonkeyPatch, app: int, section: str, key: str, expected: str
) -> None:
    data = yaml.safe_load(TINY.read_text())
    data["applications"][app]["args"][section][key] = {"tipo": 1}
    fake = FakeServe(monkeypatch, {})
    wrong = MeshConfig.from_serve_config(data)
    with pytest.raises(ConfigError, match=expected) as caught, command.serving(wrong, options()):
        pytest.fail("it serves")
    assert fake.calls == []
    assert str(caught.value).startswith(str(TINY))
