"""What `worker_extension_cls` names: importing it registers the plug-in, its class adds calls to vLLM's worker.

vLLM imports this module in each worker before it builds the model, and only for engines that ask for it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from experts.protocol.membership import Membership, endpoints_from_plain
from experts.vllm_plugin.layer import current_client, register
from experts.vllm_plugin.loader import verify_model
from experts.vllm_plugin.parent_watch import end_with_parent

logger = logging.getLogger(__name__)


register()
end_with_parent()


class ExpertMeshWorker:
    """Mixed into vLLM's worker; `collective_rpc` reaches these methods between steps.

    They take and return plain data, since vLLM's channel to its engine process carries no classes of ours. The other
    end is `cluster.router.worker_calls`.
    """

    def expertmesh_connect_ahead(self, endpoints: list[dict[str, Any] | None]) -> list[int]:
        """Start to connect to an epoch's new shards; see `MeshClient.connect_ahead`."""
        return current_client().connect_ahead(endpoints_from_plain(endpoints))

    def expertmesh_apply_membership(self, membership: dict[str, Any], wait_s: float | None = None) -> dict[str, Any]:
        """Switch to an epoch: a Membership in, an AppliedMembership out; see `MeshClient.apply_membership`."""
        verify_model(self.model_runner.get_model())  # type: ignore[attr-defined]
        return current_client().apply_membership(Membership.from_dict(membership), wait_s).to_dict()

    def expertmesh_status(self) -> dict[str, Any]:
        """The RouterStatus of this engine."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        params = sum(p.numel() for p in model.parameters())
        return replace(current_client().status(), params=params, resident_bytes=_resident_bytes()).to_dict()

    def expertmesh_trace(self) -> bytes:
        """The sampled routing decisions as the bytes of an .npz file; no bytes if nothing was recorded."""
        return current_client().recorder.to_bytes()

    def expertmesh_clear_trace(self) -> None:
        """Drop the sampled decisions and start over."""
        current_client().recorder.clear()


def _resident_bytes() -> int:
    """Anonymous memory of this process, which excludes pages of mapped files."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
