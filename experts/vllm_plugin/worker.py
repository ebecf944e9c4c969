"""Named by `worker_extension_cls`: importing it registers the plug-in, its class adds the calls that reach a worker.

vLLM imports this module in each worker before the model is built, and only for engines that ask for it.
"""

from __future__ import annotations

import logging
from typing import Any

from experts.protocol.membership import Membership, ShardEndpoint
from experts.vllm_plugin.layer import current_router, register
from experts.vllm_plugin.loader import verify_model

logger = logging.getLogger(__name__)


register()


class ExpertMeshWorker:
    """Mixed into vLLM's worker; `collective_rpc` reaches these methods between steps."""

    def expertmesh_connect_ahead(self, endpoints: list[dict[str, Any] | None]) -> list[int]:
        """Begin to connect to an epoch's new shards; see `MeshClient.connect_ahead`."""
        return current_router().connect_ahead(None if e is None else ShardEndpoint(**e) for e in endpoints)

    def expertmesh_apply_membership(self, membership: dict[str, Any], wait_s: float | None = None) -> dict[str, Any]:
        """Switch to an epoch; see `MeshClient.apply_membership`."""
        verify_model(self.model_runner.get_model())  # type: ignore[attr-defined]
        return current_router().apply_membership(Membership.from_dict(membership), wait_s)

    def expertmesh_status(self) -> dict[str, Any]:
        """Counters and membership of this router, and what it holds."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        return {
            **current_router().status(),
            "params": sum(p.numel() for p in model.parameters()),
            "resident_bytes": _resident_bytes(),
        }

    def expertmesh_trace(self) -> bytes:
        """The sampled routing decisions as the bytes of an .npz file; none if nothing was recorded."""
        return current_router().recorder.to_bytes()

    def expertmesh_clear_trace(self) -> None:
        """Forget the sampled decisions and begin anew."""
        current_router().recorder.clear()


def _resident_bytes() -> int:
    """Anonymous memory of this process; pages of mapped files are not its own."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
