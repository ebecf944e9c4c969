"""What of Ray's internals the gateway uses: where the replicas of another application listen for HTTP, and the config
that Serve runs, to change one deployment's `user_config` in it.

`tests/cluster/gateway/test_ray_joints.py` says which of these a new version has moved.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from cluster.ray_joints import node_address

LOCAL_HOST = "127.0.0.1"


def http_endpoints(handle: DeploymentHandle) -> dict[str, tuple[str, int]]:
    """(host, port) of each running replica of an ingress deployment, by id; Serve pushes changes to the handle.

    Those on this node are at 127.0.0.1, as for HAProxy: with `http_options.host` 127.0.0.1 they listen there alone.
    Empty before the first news, without such a deployment, and where replicas do not listen since HAProxy is off.
    """
    here = node_address()
    if not handle.is_initialized:
        handle._init()
    router: Any = handle._router
    inner = router._asyncio_router
    chooser = inner._request_router
    infos = (
        (inner._running_replicas or ())
        if chooser is None
        else [each._replica_info for each in list(chooser.curr_replicas.values())]
    )
    return {
        info.replica_id.unique_id: (LOCAL_HOST if info.node_ip == here else info.node_ip, info.backend_http_port)
        for info in infos
        if info.backend_http_port is not None and info.node_ip is not None
    }


def running_config() -> dict[str, Any]:
    """The applications of the Serve config that is deployed, as `deploy_config` takes them; none if there is none.

    Blocks for a moment. What a config says beside its applications stays as it is when this is deployed again.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    configs = ray.get(client._controller.get_app_configs.remote())
    told = {"applications": [config.model_dump(exclude_unset=True) for config in configs.values()]}
    capacity = client.get_serve_details().get("target_capacity")
    return told if capacity is None else {**told, "target_capacity": capacity}
