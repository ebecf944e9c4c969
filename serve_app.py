"""The builders of the Serve applications.

Import paths in a Serve config (see configs/):

    import_path: serve_app:build_experts   args: sections model, shards, placement, membership
    import_path: serve_app:build_llm       args: sections model, routers, transport, deadlines, http
    import_path: serve_app:build_console   args: experts_app, llm_apps, http
    import_path: serve_app:build_gateway   args: http

`expertmesh serve FILE` serves such a file on this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.gateway.sections import GatewayAppConfig
from cluster.config.parse import parse

if TYPE_CHECKING:
    from ray.serve.deployment import Application

# Ray is imported inside functions: it reads its environment on import, and the command sets that environment first.


def build_experts(args: dict[str, Any]) -> Application:
    """The application with the shards and their controller. Raises ConfigError with the key."""
    from cluster.build import experts_application
    from cluster.refusals.to_serve import refusals_for_serve

    with refusals_for_serve():
        return experts_application(parse(ExpertsAppConfig, args))


def build_llm(args: dict[str, Any]) -> Application:
    """The application with the routers, which serve the OpenAI API. Raises ConfigError with the key."""
    from cluster.build import llm_application
    from cluster.refusals.to_serve import refusals_for_serve

    with refusals_for_serve():
        return llm_application(parse(LLMAppConfig, args))


def build_console(args: dict[str, Any]) -> Application:
    """The application for people and their tools: status, placement, traces. Raises ConfigError with the key."""
    from cluster.build import console_application
    from cluster.refusals.to_serve import refusals_for_serve

    with refusals_for_serve():
        return console_application(parse(ConsoleAppConfig, args))


def build_gateway(args: dict[str, Any]) -> Application:
    """The application that has one address for several models. Raises ConfigError with the key."""
    from cluster.build import gateway_application
    from cluster.refusals.to_serve import refusals_for_serve

    with refusals_for_serve():
        return gateway_application(parse(GatewayAppConfig, args))
