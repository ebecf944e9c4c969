"""What pools use of Ray's internals, beside `cluster.ray_joints`; a test names what a new version has moved."""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle


def has_replicas(handle: DeploymentHandle) -> bool:
    """Whether Serve knows of a replica that runs; a call would else wait for one. True as long as nothing is known."""
    if not handle.is_initialized or not handle.running_replicas_populated():
        return True
    router: Any = handle._router
    return bool(router._asyncio_router._active_request_router.curr_replicas)


def raw_request(headers: dict[str, str]) -> Any:
    """Headers of a request, as Ray Serve LLM's servers take them."""
    from ray.llm._internal.serve.core.protocol import RawRequestInfo

    return RawRequestInfo(headers=headers)
