"""Routers and shards whose rows travel apart from their messages: over NCCL or CUDA IPC between GPUs, or over their
stand-ins without a GPU, gloo_split and shm_split.

Several ranks share a GPU if there are not enough; see `experts.transports.nccl_sharing` for how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.mesh_client import MeshClient
from experts.protocol.settings import RouterSettings
from experts.transports.nccl_sharing import spread
from placement.placement import Placement
from tests.support.small_mesh import Batch, Mesh, start_shards

NCCL = pytest.param("nccl", marks=pytest.mark.gpu)
CUDA_IPC = pytest.param("cuda_ipc", marks=pytest.mark.gpu)
KINDS = [NCCL, CUDA_IPC, "gloo_split", "shm_split"]


def places(kind: str, num_shards: int) -> tuple[str, list[str]]:
    """(the router's device, each shard's device). Skips the test without a GPU for it, and says what was left out."""
    if kind not in ("nccl", "cuda_ipc"):
        return "cpu", ["cpu"] * num_shards
    try:
        return spread(num_shards)
    except ValueError as error:
        pytest.skip(f"1 router and {num_shards} shards over {kind} were left out: {error}")


@contextlib.contextmanager
def mesh_over(kind: str, model: Path, placement: Placement, **settings: object) -> Iterator[Mesh]:
    """A mesh with each shard on its own device."""
    _, devices = places(kind, placement.num_ranks)
    mesh = Mesh(model, placement, {})
    try:
        for device in dict.fromkeys(devices):
            ranks = [rank for rank, place in enumerate(devices) if place == device]
            mesh.shards |= start_shards(model, placement, ranks, device=device, **settings)
        yield mesh
    finally:
        mesh.close()


def router_over(kind: str, mesh: Mesh, dtype: torch.dtype = torch.float32, **settings: object) -> MeshClient:
    """A connected router, closed with the mesh."""
    spec = ExpertCheckpoint.open(mesh.model).spec
    shape = LayerShape(spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size, dtype)
    values = {"dispatch_timeout_ms": 60_000, "connect_timeout_s": 60.0, "trace_tokens": 0, **settings}
    # The settings do not know the stand-ins: they exist for tests only.
    chosen = RouterSettings(model_path=str(mesh.model), **values).model_copy(update={"transport": kind})
    router = MeshClient(chosen, mesh.checkpoint, shape, places(kind, mesh.placement.num_ranks)[0])
    mesh.routers.append(router)
    answer = router.apply_membership(mesh.membership())
    assert answer.lost == {}, answer
    return router


def on_device_of(router: MeshClient, batch: Batch) -> list[torch.Tensor]:
    """x, weights, ids where the router's activations live."""
    return [t.to(router.device) for t in (batch.x_TD, batch.weights_TK, batch.ids_TK)]


def run_there(router: MeshClient, layer: int, batch: Batch) -> torch.Tensor:
    """One layer through a router; the result on the CPU."""
    got_TD = router.finish(router.begin(layer, *on_device_of(router, batch)))
    assert got_TD.device == torch.device(router.device)
    return got_TD.cpu()
