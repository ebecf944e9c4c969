"""The two Serve applications, and the command that serves them on this machine.

As import paths of a Serve config (see configs/):

    import_path: serve_app:build_experts   args: sections model, shards, placement, membership
    import_path: serve_app:build_llm       args: sections model, routers, transport, deadlines, http

As a command: `python -m serve_app configs/tiny-cpu.yaml`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.deployment import Application

from cluster.build import experts_application, llm_application
from cluster.config import ExpertsAppConfig, LLMAppConfig, parse


def build_experts(args: dict[str, Any]) -> Application:
    """The application of shards and their controller. Raises ConfigError naming the key."""
    return experts_application(parse(ExpertsAppConfig, args))


def build_llm(args: dict[str, Any]) -> Application:
    """The application of routers and the OpenAI API. Raises ConfigError naming the key."""
    return llm_application(parse(LLMAppConfig, args))


if __name__ == "__main__":
    from cluster.command import main

    main()
