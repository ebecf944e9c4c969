"""What a router takes of its GPU after vLLM has shared it out: ends of pairs, and experts that no shard holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experts.protocol.wire import reply_capacity, request_capacity

if TYPE_CHECKING:  # it needs pydantic, which benchmarks on a GPU may lack
    from experts.protocol.settings import RouterSettings

# Of a communicator of two ranks that only send and receive: its channels' buffers (NCCL_BUFFSIZE is 4 MiB a channel)
# and its kernels' arguments. Reasoned, not measured on a GPU.
COMMUNICATOR_BYTES = 64 << 20


def pair_device_bytes(transport: str, max_rows: int, top_k: int, row_bytes: int) -> int:
    """Bytes of the router's GPU that its end of one pair takes at most. Rows of CUDA IPC are in the shard's GPU."""
    if transport not in ("auto", "nccl"):
        return 0
    return request_capacity(max_rows, top_k, row_bytes) + reply_capacity(max_rows, row_bytes) + COMMUNICATOR_BYTES


def router_device_bytes(settings: RouterSettings, top_k: int, row_bytes: int, hidden_size: int) -> int:
    """Bytes of its GPU that a router takes once vLLM has sized its KV cache, with `settings.reserve_for_shards` shards.

    The largest there may be: pairs over NCCL unless the transport rules them out, a full cache of the fallback, sums in
    float32 of one message's rows, and the routing decisions and plan of those rows (int32 and float32).
    """
    rows = settings.max_rows_per_dispatch
    pairs = settings.reserve_for_shards * pair_device_bytes(settings.transport, rows, top_k, row_bytes)
    fallback = settings.fallback_cache_bytes if settings.fallback_max_ms_per_step else 0
    return pairs + fallback + rows * hidden_size * 4 + 4 * rows * top_k * 4
