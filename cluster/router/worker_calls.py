"""The calls to the plug-in in an engine's worker, with time-outs. The other end is `experts.vllm_plugin.worker`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from experts.protocol.membership import AppliedMembership, Membership, ShardEndpoint, endpoints_to_plain
from experts.protocol.status import RouterStatus


class EngineSilentError(RuntimeError):
    """The engine's worker did not answer a call; the message says which one and how long it was waited for."""


class WorkerCalls:
    """Methods of one engine's worker, which vLLM runs between steps.

    `collective_rpc` is vLLM's: method and args to the answers of all workers, of which there is one. Each call raises
    EngineSilentError after `timeout_s`.
    """

    def __init__(self, collective_rpc: Callable[..., Awaitable[list[Any]]], timeout_s: float) -> None:
        self._collective_rpc = collective_rpc
        self.timeout_s = timeout_s

    async def connect_ahead(self, endpoints: Iterable[ShardEndpoint | None]) -> list[int]:
        """Start to connect to an epoch's new shards; the ranks that are not done yet."""
        return await self._call("expertmesh_connect_ahead", endpoints_to_plain(endpoints))

    async def apply_membership(
        self, membership: Membership, wait_s: float | None, connect_s: float
    ) -> AppliedMembership:
        """Switch to an epoch. A shard not connected within `wait_s` is left out (None: the worker's own time-out).

        `connect_s` is how long that may take at most; it adds to the time-out.
        """
        arguments = (membership.to_dict(), wait_s)
        return AppliedMembership.from_dict(
            await self._call("expertmesh_apply_membership", *arguments, extra_s=connect_s)
        )

    async def status(self) -> RouterStatus:
        """Counters and membership."""
        return RouterStatus.from_dict(await self._call("expertmesh_status"))

    async def trace(self) -> bytes:
        """The sampled routing decisions as an .npz file; no bytes if nothing was recorded."""
        return await self._call("expertmesh_trace")

    async def clear_trace(self) -> None:
        """Drop the sampled routing decisions and start over."""
        await self._call("expertmesh_clear_trace")

    async def _call(self, method: str, *args: Any, extra_s: float = 0.0) -> Any:
        """The time-out is kept here: vLLM takes one too, but neither an engine in another process nor the executor of a
        single worker heeds it.
        """
        timeout_s = self.timeout_s + extra_s
        try:
            async with asyncio.timeout(timeout_s):
                [answer] = await self._collective_rpc(method, args=args)
        except TimeoutError:
            raise EngineSilentError(f"the engine's worker did not answer {method} in {timeout_s} s") from None
        return answer
