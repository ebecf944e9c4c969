"""When an application of routers gets a request router, and what it is."""

from __future__ import annotations

import asyncio
import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.config.llm_sections import RoutersSection, SignaturesSection
from cluster.ray_joints import with_request_router
from cluster.router import request_routing
from cluster.router.options import router_options
from cluster.router.request_routing import (
    FORWARD_BODY,
    HAPROXY_SWITCH,
    OPTIONS,
    OURS,
    has_request_router,
    options_of,
    request_router_config,
    route_requests,
)
from cluster.signatures.request_router import SignatureRouter

PREFIX = {"request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter"}


def section(router_config: dict[str, Any] | None) -> RoutersSection:
    given = {} if router_config is None else {"request_router_config": router_config}
    return RoutersSection(deployment_config=given)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of request routers that were attached; stands in for Serve."""
    options: list[dict[str, Any]] = []

    def attach(application: Any, given: dict[str, Any]) -> Any:
        options.append(given)
        return application

    monkeypatch.setattr(request_routing, "with_request_router", attach)
    return options


@pytest.mark.parametrize(
    ("config", "named"), [(None, False), ({}, False), ({"max_backoff_s": 1}, False), (PREFIX, True)]
)
def test_only_a_request_router_with_a_name_is_attached(
    monkeypatch: pytest.MonkeyPatch, attached: list[dict[str, Any]], config: dict[str, Any] | None, named: bool
) -> None:
    monkeypatch.setenv(HAPROXY_SWITCH, "1")
    monkeypatch.setenv(FORWARD_BODY, "1")
    assert has_request_router(section(config)) is named
    application = object()
    assert route_requests(application, section(config)) is application  # type: ignore[comparison-overlap, arg-type]
    assert attached == ([options_of(section(config))] if named else [])


@pytest.mark.parametrize(
    ("haproxy", "body", "warning"),
    [
        ("0", "1", "RAY_SERVE_ENABLE_HA_PROXY is not 1"),
        ("1", "0", "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY is not 1"),
    ],
)
def test_a_cluster_that_cannot_route_by_text_is_told(
    monkeypatch: pytest.MonkeyPatch,
    attached: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    haproxy: str,
    body: str,
    warning: str,
) -> None:
    monkeypatch.setenv(HAPROXY_SWITCH, haproxy)
    monkeypatch.setenv(FORWARD_BODY, body)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        route_requests(object(), section(PREFIX))  # type: ignore[arg-type]
    assert warning in caplog.text
    assert len(attached) == int(haproxy)


def test_the_router_by_prefixes_is_one_that_learns() -> None:
    kwargs = {"request_router_kwargs": {"imbalanced_threshold": 3}}
    other = {"request_router_class": "a.B", **kwargs}
    assert request_router_config(section({**PREFIX, **kwargs})) == {"request_router_class": OURS, **kwargs}
    assert request_router_config(section(other)) == other
    options = router_options(section({**PREFIX, **kwargs}))
    assert options["request_router_config"]["request_router_class"] == OURS
    assert "request_router_config" not in router_options(section(None))


def test_signatures_choose_a_request_router_with_their_options() -> None:
    assert RoutersSection().expert_signatures is None, "off by default"
    routers = RoutersSection(expert_signatures=SignaturesSection(max_lead=7, report_s=1.5))
    config = router_options(routers)["request_router_config"]
    assert has_request_router(routers)
    assert config["request_routing_stats_period_s"] == 1.5
    made = RequestRouterConfig.model_validate(config)
    assert made.get_request_router_class() is SignatureRouter
    assert SignaturesSection(**made.request_router_kwargs) == routers.expert_signatures
    with pytest.raises(ValueError, match="each says which router gets a request; set one"):
        RoutersSection(expert_signatures=SignaturesSection(), deployment_config={"request_router_config": PREFIX})


def test_another_choice_restarts_the_process_that_chooses() -> None:
    """Serve (2.60) keeps the class that a handle began with, whatever a later config says."""
    by_prefix, more = section(PREFIX), section({**PREFIX, "request_router_kwargs": {"imbalanced_threshold": 3}})
    by_signature = RoutersSection(expert_signatures=SignaturesSection())
    environments = [options_of(each)["ray_actor_options"] for each in (by_prefix, more, by_signature)]
    assert len({str(each) for each in environments}) == 3
    assert options_of(section(PREFIX)) == options_of(by_prefix)
    from ray.serve._private.router import AsyncioRouter

    assert "if not self._request_router and" in inspect.getsource(AsyncioRouter.request_router.fget)


def test_it_takes_no_room_and_is_missed_soon() -> None:
    deployment = serve.deployment(lambda: None, **OPTIONS)
    assert deployment.ray_actor_options["num_cpus"] == 0
    assert OPTIONS["health_check_period_s"] <= 2


def test_haproxy_asks_a_deployment_where_a_request_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    from ray.llm._internal.serve.core.ingress import router as llm_router
    from ray.serve._private import build_app as build_app_module
    from ray.serve._private.build_app import build_app

    monkeypatch.setattr(build_app_module, "RAY_SERVE_ENABLE_HA_PROXY", True)

    application = with_request_router(serve.deployment(lambda: None, name="A").bind(), {"name": "B"})
    built = build_app(application, name="app", make_deployment_handle=lambda deployment, app: deployment.name)
    assert built.ingress_deployment_name == "A"
    assert built.ingress_request_router_deployment is not None
    assert built.ingress_request_router_deployment.name == "B"
    assert "server: DeploymentHandle," in inspect.getsource(llm_router)


def test_serve_tells_a_request_router_nothing_of_what_only_chooses() -> None:
    """Once it does, cluster/router/prefix_router.py is not needed any more."""
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    from ray.serve._private.router import AsyncioRouter
    from ray.serve.llm.request_router import PrefixCacheAffinityRouter

    assert "on_request_routed" in inspect.getsource(AsyncioRouter)
    assert "on_request_routed" not in inspect.getsource(AsyncioRouter.choose_replica)
    ranks = inspect.getsource(PrefixCacheAffinityRouter._prefix_match_best_replicas)
    assert "self._replicas[ReplicaID.from_full_id_str(chosen_id_string)]" in ranks
    assert list(inspect.signature(PrefixCacheAffinityRouter.on_request_routed).parameters)[1:] == [
        "pending_request",
        "replica_id",
        "result",
    ]


def test_what_has_no_text_goes_by_load() -> None:
    """Serve's own proxy hands request routers the HTTP request, and one that raised would leave it waiting for ever."""
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    from cluster.router.prefix_router import PrefixRouter

    router = PrefixRouter.__new__(PrefixRouter)
    assert asyncio.run(router._prefix_match_best_replicas(SimpleNamespace(args=[object()]), [])) == [[]]
