"""Which router gets a request, where the config says more than "the one with the fewest".

HAProxy spreads requests by itself. A request router of Serve's, such as the one that looks for the longest known
prefix, lives in a deployment that HAProxy asks for each request, with the request's text.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application

from cluster.config.llm_sections import RoutersSection
from cluster.ray_joints import with_request_router
from cluster.serve_environment import FORWARD_BODY, HAPROXY_SWITCH

logger = logging.getLogger("ray.serve")

# Serve's request router runs in it. Serve keeps one on each node with a proxy, whatever number is asked for.
OPTIONS: dict[str, Any] = {
    "name": "RequestRouter",
    "max_ongoing_requests": 1000,
    "ray_actor_options": {"num_cpus": 0},
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_wait_loop_s": 0.1,
}
SERVES_OWN = "ray.serve.llm.request_router.PrefixCacheAffinityRouter"
OURS = "cluster.router.prefix_router.PrefixRouter"
CHOSEN = "EXPERTMESH_REQUEST_ROUTER"  # in the environment of its process
BY_SIGNATURE = "cluster.signatures.request_router.SignatureRouter"


def request_router_config(routers: RoutersSection) -> dict[str, Any] | None:
    """Serve's `request_router_config`; None if the config says nothing of one.

    Serve's router by prefixes is replaced by ours, which learns behind HAProxy.
    """
    if (wanted := routers.expert_signatures) is not None:
        return {
            "request_router_class": BY_SIGNATURE,
            "request_router_kwargs": wanted.model_dump(),
            "request_routing_stats_period_s": wanted.report_s,
        }
    given: dict[str, Any] | None = routers.deployment_config.get("request_router_config")
    if given is not None and given.get("request_router_class") == SERVES_OWN:
        return {**given, "request_router_class": OURS}
    return given


def has_request_router(routers: RoutersSection) -> bool:
    """Whether the config names a request router besides Serve's usual one."""
    given = request_router_config(routers)
    return given is not None and not RequestRouterConfig.model_validate(given).is_default_request_router()


def route_requests(application: Application, routers: RoutersSection) -> Application:
    """The application of routers; if the config names a request router, with what HAProxy asks where to send each."""
    if not has_request_router(routers):
        return application
    if os.environ.get(HAPROXY_SWITCH) != "1":
        logger.warning("%s is not 1 where Ray was started: Serve's own proxy spreads requests by load", HAPROXY_SWITCH)
        return application
    if os.environ.get(FORWARD_BODY) != "1":
        logger.warning("%s is not 1 where Ray was started: requests are routed without their text", FORWARD_BODY)
    return with_request_router(application, options_of(routers))


def options_of(routers: RoutersSection) -> dict[str, Any]:
    """OPTIONS for a config's request router, which is told to its process.

    Serve restarts the process where that has changed. It would else go on with the class and the options it had.
    """
    told = json.dumps(request_router_config(routers), sort_keys=True, default=str)
    actor = {**OPTIONS["ray_actor_options"], "runtime_env": {"env_vars": {CHOSEN: told}}}
    return {**OPTIONS, "ray_actor_options": actor}
