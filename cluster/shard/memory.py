"""The memory of a shard's process, for its series."""

from __future__ import annotations

import sys

from cluster.observability.shard_series import ShardFacts
from experts.protocol.status import ShardStatus


def shard_facts(status: ShardStatus) -> ShardFacts:
    """A status with the memory of this process. `torch` is not imported for it."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return ShardFacts(status, _resident_bytes(), torch.cuda.memory_reserved() if on_gpu and torch else None)


def _resident_bytes() -> int:
    """Anonymous memory, which excludes pages of mapped files."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), 0)
