"""What the gateway takes from Ray's inside: a new version that moves one of them fails here, by name."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private import common, controller, router
from ray.serve._private.request_router import RequestRouter, RunningReplica
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeApplicationSchema

from cluster.gateway import ray_joints as joints


def info(name: str, ip: str | None, port: int | None) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), node_ip=ip, backend_http_port=port)


INFOS = [info("near", "10.0.0.1", 1), info("far", "10.0.0.2", 2), info("starts", "10.0.0.2", None)]


@pytest.mark.parametrize("chosen_by_serve", [True, False], ids=["request router", "news alone"])
def test_replicas_are_where_serve_says_and_those_of_this_node_at_home(
    monkeypatch: pytest.MonkeyPatch, chosen_by_serve: bool
) -> None:
    monkeypatch.setattr(joints, "node_address", lambda: "10.0.0.1")
    wrapped = {each.replica_id.unique_id: SimpleNamespace(_replica_info=each) for each in INFOS}
    inner = SimpleNamespace(
        _request_router=SimpleNamespace(curr_replicas=wrapped) if chosen_by_serve else None,
        _running_replicas=None if chosen_by_serve else INFOS,
    )
    handle: Any = SimpleNamespace(is_initialized=True, _router=SimpleNamespace(_asyncio_router=inner))
    assert joints.http_endpoints(handle) == {"near": ("127.0.0.1", 1), "far": ("10.0.0.2", 2)}
    if not chosen_by_serve:
        inner._running_replicas = None
        assert joints.http_endpoints(handle) == {}, "before the first news"


def test_ray_has_them() -> None:
    assert isinstance(DeploymentHandle.is_initialized, property)
    assert callable(DeploymentHandle._init)
    source = inspect.getsource(router)
    for name in ("self._asyncio_router = ", "self._request_router: ", "self._running_replicas: "):
        assert name in source
    assert "curr_replicas" in dir(RequestRouter)
    assert "self._replica_info" in inspect.getsource(RunningReplica.__init__)
    fields = common.RunningReplicaInfo.__dataclass_fields__
    assert {"replica_id", "node_ip", "backend_http_port"} <= set(fields)
    assert callable(controller.ServeController.get_app_configs)
    assert {"deployments", "args", "import_path"} <= set(ServeApplicationSchema.model_fields)
