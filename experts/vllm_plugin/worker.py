"""What `worker_extension_cls` names: importing it registers the plug-in, its class adds calls to vLLM's worker.

vLLM imports this module in each worker before it builds the model, and only for engines that ask for it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from experts.protocol.log_lines import set_log_fields
from experts.protocol.membership import Membership
from experts.protocol.secret import MeshSecret
from experts.vllm_plugin.joints import (
    check_adapters,
    keep_a_slot_without_adapter,
    leave_moe_layers_without_adapters,
)
from experts.vllm_plugin.layer import current_client, register
from experts.vllm_plugin.loader import verify_model
from experts.vllm_plugin.new_prompts import note_new_prompts
from experts.vllm_plugin.parent_watch import end_with_parent
from experts.vllm_plugin.refusals import refuse_adapter

logger = logging.getLogger(__name__)


def follow_vllm_log() -> None:
    """Send what `experts` logs in an engine's process where vLLM's log goes, as text or JSON."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("experts")
    set_log_fields(role="engine")
    if not ours.handlers:
        ours.setLevel(theirs.getEffectiveLevel())
        ours.handlers = list(theirs.handlers)


register()
leave_moe_layers_without_adapters()
keep_a_slot_without_adapter()
check_adapters(refuse_adapter)
end_with_parent()
follow_vllm_log()


class ExpertMeshWorker:
    """Mixed into vLLM's worker; `collective_rpc` reaches these methods between steps.

    They take and return plain data, since vLLM's channel to its engine process carries no classes of ours. The other
    end is `cluster.router.worker_calls`.
    """

    def expertmesh_use_secret(self, text: str) -> None:
        """Prove by this secret to shards from now on; see `MeshClient.use_secret`."""
        current_client().use_secret(MeshSecret(text))

    def expertmesh_prepare_membership(self, told: bytes, connect_s: float | None = None) -> dict[str, Any]:
        """Begin to prepare an epoch: bytes of a Membership in, a Preparation out; see `MeshClient.prepare`."""
        return current_client().prepare(told, connect_s).to_dict()

    def expertmesh_preparation(self) -> dict[str, Any]:
        """The Preparation of the newest epoch."""
        return current_client().preparation().to_dict()

    def expertmesh_apply_membership(self, epoch: int) -> dict[str, Any]:
        """Use an epoch that is ready; an AppliedMembership out; see `MeshClient.apply`."""
        client = current_client()
        if not client.attached:
            verify_model(self.model_runner.get_model())  # type: ignore[attr-defined]
        set_log_fields(epoch=epoch)
        return client.apply(epoch).to_dict()

    def expertmesh_use_membership(self, membership: dict[str, Any]) -> dict[str, Any]:
        """Prepare and use a whole Membership, waiting for its shards: for engines that no router's process drives."""
        verify_model(self.model_runner.get_model())  # type: ignore[attr-defined]
        return current_client().apply_membership(Membership.from_dict(membership)).to_dict()

    def expertmesh_status(self) -> dict[str, Any]:
        """The RouterStatus of this engine."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        params = sum(p.numel() for p in model.parameters())
        return replace(current_client().status(), params=params, resident_bytes=_resident_bytes()).to_dict()

    def expertmesh_trace(self, reader: str = "") -> bytes:
        """A reader's sampled routing decisions as the bytes of an .npz file; no bytes if nothing was recorded.

        Of several workers the first one records, for all.
        """
        client = current_client()
        return client.recorder.to_bytes(reader) if client.records else b""

    def expertmesh_clear_trace(self, reader: str = "") -> None:
        """Let a reader of the sampled decisions begin anew."""
        client = current_client()
        if client.records:
            client.recorder.clear(reader)

    def expertmesh_end_trace(self, reader: str) -> None:
        """The reader is done."""
        current_client().recorder.end(reader)

    def expertmesh_observation(self, go_on: bool) -> bytes:
        """What was observed since the last call; see `StepRecorder.observation`."""
        return current_client().recorder.observation(go_on)

    def expertmesh_prompts(self) -> list[dict[str, Any]]:
        """The PromptSamples since the last call, which has the worker begin; see `StepRecorder.prompts`."""
        client = current_client()
        if not client.records:
            return []
        note_new_prompts(self.vllm_config, client.recorder.note_prompts)  # type: ignore[attr-defined]
        return [sample.to_dict() for sample in client.recorder.prompts()]

    def expertmesh_loads(self, watch_s: float) -> dict[str, Any]:
        """How many tokens picked each expert; see `StepRecorder.loads`. Of several workers the first one counts."""
        client = current_client()
        return client.recorder.loads(watch_s) if client.records else {}


def _resident_bytes() -> int:
    """Anonymous memory of this process, which excludes pages of mapped files."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
