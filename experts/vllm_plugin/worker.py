"""What `worker_extension_cls` names: importing it registers the plug-in, its class adds calls to vLLM's worker.

vLLM imports this module in each worker before it builds the model, and only for engines that ask for it.
"""

from __future__ import annotations

import logging
from typing import Any

from experts.protocol.membership import Membership, ShardEndpoint
from experts.vllm_plugin.layer import current_client, register
from experts.vllm_plugin.loader import verify_model

logger = logging.getLogger(__name__)


register()


class ExpertMeshWorker:
    """Mixed into vLLM's worker; `collective_rpc` reaches these methods between steps."""

    def expertmesh_connect_ahead(self, endpoints: list[dict[str, Any] | None]) -> list[int]:
        """Start connecting to an epoch's new shards; see `MeshClient.connect_ahead`."""
        return current_client().connect_ahead(None if e is None else ShardEndpoint(**e) for e in endpoints)

    def expertmesh_apply_membership(self, membership: dict[str, Any], wait_s: float | None = None) -> dict[str, Any]:
        """Switch to an epoch; see `MeshClient.apply_membership`."""
        verify_model(self.model_runner.get_model())  # type: ignore[attr-defined]
        return current_client().apply_membership(Membership.from_dict(membership), wait_s)

    def expertmesh_status(self) -> dict[str, Any]:
        """Counters and membership of this router, and what it holds."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        return {
            **current_client().status(),
            "params": sum(p.numel() for p in model.parameters()),
            "resident_bytes": _resident_bytes(),
        }

    def expertmesh_trace(self) -> bytes:
        """The sampled routing decisions as the bytes of an .npz file; empty if nothing was recorded."""
        return current_client().recorder.to_bytes()

    def expertmesh_clear_trace(self) -> None:
        """Drop the sampled decisions and start over."""
        current_client().recorder.clear()


def _resident_bytes() -> int:
    """Anonymous memory of this process, without pages of mapped files."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
