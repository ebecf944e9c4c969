"""The engine options that make a router one of a pool. Imports no vllm."""

from __future__ import annotations

from typing import Any, Literal

Pool = Literal["prefill", "decode"]

_ROLES: dict[Pool, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


def connector_options(pool: Pool, told: dict[str, Any], device: str) -> dict[str, Any]:
    """`kv_transfer_config` of a pool's engines by a connector of vLLM's: what the user `told`, and what he left open.

    A prompt whose blocks do not come, since the router that had them is gone, is computed by whoever waits for them;
    vLLM's own default fails the request. `device`: `cuda` or `cpu`, on which blocks wait.
    """
    defaults = {"kv_role": _ROLES[pool], "kv_load_failure_policy": "recompute", "kv_buffer_device": device}
    return {"kv_transfer_config": {**defaults, **told}}


def transfer_options(pool: Pool, folder: str, max_bytes: int) -> dict[str, Any]:
    """`kv_transfer_config` of a pool's engines: files in `folder`, of at most `max_bytes` together."""
    return {
        "kv_transfer_config": {
            "kv_connector": "PromptFiles",
            "kv_connector_module_path": "experts.kv_transfer.vllm_connector",
            "kv_role": _ROLES[pool],
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"folder": folder, "max_bytes": max_bytes},
        }
    }
