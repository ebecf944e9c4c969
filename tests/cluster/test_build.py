"""What applications are made of: a ledger where keys have names, prefill routers where there are pools."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.build_app import build_app

from cluster import build
from cluster.config.apps import LLMAppConfig
from cluster.config.gateway.sections import GATEWAY, GatewayAppConfig
from cluster.config.parse import parse
from cluster.config.replicas import PREFILL_ROUTER
from cluster.controller.client import ROUTER
from cluster.keys.deployment import KEY_LEDGER
from tests.support.serve.shipped_configs import serve_config


def deployments(http: dict[str, Any], monkeypatch: pytest.MonkeyPatch, config: str = "tiny-cpu.yaml") -> dict[str, Any]:
    """Those of the application `llm` of a shipped config, by name, where the model and keys are not looked for."""
    args = serve_config(config)["applications"][1]["args"]
    args["http"] |= http
    monkeypatch.setattr(build, "with_pinned_model", lambda config: config)
    monkeypatch.setattr(build, "folder_here", lambda path: (None, False))
    monkeypatch.setattr(build, "refuse_llm", lambda *args, **more: None)
    application = build.llm_application(parse(LLMAppConfig, args))
    built = build_app(application, name="llm", make_deployment_handle=lambda deployment, app: deployment.name)
    assert built.ingress_deployment_name == ROUTER
    return {each.name: each for each in built.deployments}


@pytest.mark.parametrize("http", [{}, {"api_keys": ["k"]}, {"api_keys_env": "K"}])
def test_without_names_of_keys_the_routers_are_alone(http: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = deployments(http, monkeypatch)
    assert found.keys() == {ROUTER}
    assert len(found[ROUTER].init_args) == 1
    assert found[ROUTER].init_kwargs == {}


@pytest.mark.parametrize("http", [{"keys_file": "/keys.yaml"}, {"keys_env": "K"}])
def test_keys_with_names_have_one_ledger_that_routers_call(
    http: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = deployments(http, monkeypatch)
    assert found.keys() == {ROUTER, KEY_LEDGER}
    assert found[ROUTER].init_kwargs == {"ledger": KEY_LEDGER}
    assert found[KEY_LEDGER].num_replicas == 1, "whose memory is the state"
    assert found[KEY_LEDGER].ray_actor_options["num_cpus"] == 0, "it needs no room of its own"


def test_routers_that_count_elsewhere_have_no_ledger_and_the_gateway_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = deployments({"keys_file": "/keys.yaml", "ledger_app": "gateway"}, monkeypatch)
    assert found.keys() == {ROUTER}
    monkeypatch.setattr(build, "refuse_gateway", lambda *args, **more: None)
    for http, expected in (({"keys_file": "/keys.yaml"}, {GATEWAY, KEY_LEDGER}), ({"api_keys": ["k"]}, {GATEWAY})):
        application = build.gateway_application(parse(GatewayAppConfig, {"http": http}))
        built = build_app(application, name="gateway", make_deployment_handle=lambda deployment, app: deployment.name)
        assert built.ingress_deployment_name == GATEWAY
        assert {each.name for each in built.deployments} == expected


def test_two_pools_are_two_deployments_of_which_one_takes_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = deployments({"keys_env": "K"}, monkeypatch, "tiny-pools.yaml")
    assert found.keys() == {ROUTER, PREFILL_ROUTER, KEY_LEDGER}
    assert found[ROUTER].init_kwargs == {"ledger": KEY_LEDGER, "prefill": PREFILL_ROUTER}
    assert found[PREFILL_ROUTER].init_kwargs == {}
    assert found[PREFILL_ROUTER].init_args == found[ROUTER].init_args
    assert (found[ROUTER].num_replicas, found[PREFILL_ROUTER].num_replicas) == (1, 1)
