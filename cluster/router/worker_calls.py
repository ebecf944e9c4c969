"""The calls to the plug-in in an engine's workers, with time-outs. The other end is `experts.vllm_plugin.worker`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from experts.protocol.membership import AppliedMembership, Preparation
from experts.protocol.merging import merged_applied, merged_preparation, merged_status
from experts.protocol.secret import MeshSecret
from experts.protocol.status import RouterStatus
from placement.traces.prompts import PromptSample


class EngineSilentError(RuntimeError):
    """The engine's worker did not answer a call; the message says which one and how long it was waited for."""


class WorkerCalls:
    """Methods of one engine's workers, which vLLM runs between steps.

    `collective_rpc` is vLLM's: method and args to the answers of all workers, one for each rank of its tensor
    parallelism. Each call raises EngineSilentError after `timeout_s`.
    """

    def __init__(self, collective_rpc: Callable[..., Awaitable[list[Any]]], timeout_s: float) -> None:
        self._collective_rpc = collective_rpc
        self.timeout_s = timeout_s
        self._waiting: set[asyncio.Future[list[Any]]] = set()
        self._ended = ""

    def engine_ended(self, why: str) -> None:
        """Have the calls that wait raise EngineSilentError now: vLLM leaves them without an answer.

        Serve waits for those it made before it stops the replica, and only then are its resources free.
        """
        self._ended = why
        for call in self._waiting:
            call.cancel()

    async def use_secret(self, secret: MeshSecret) -> None:
        """Prove by this secret to shards from now on. It travels so, since vLLM logs its settings."""
        await self._call("expertmesh_use_secret", secret.reveal())

    async def prepare(self, told: bytes, connect_s: float | None) -> Preparation:
        """Begin to prepare an epoch beside the steps: what `Membership.delta_from` or `to_bytes` gave.

        New shards that take longer than `connect_s` are left out (None: longer than the worker's own time-out).
        """
        return merged_preparation(
            [Preparation.from_dict(each) for each in await self._call("expertmesh_prepare_membership", told, connect_s)]
        )

    async def preparation(self) -> Preparation:
        """How far the newest epoch is."""
        return merged_preparation([Preparation.from_dict(each) for each in await self._call("expertmesh_preparation")])

    async def apply(self, epoch: int) -> AppliedMembership:
        """Use an epoch that is ready."""
        return merged_applied(
            [AppliedMembership.from_dict(each) for each in await self._call("expertmesh_apply_membership", epoch)]
        )

    async def status(self) -> RouterStatus:
        """Counters and membership."""
        return merged_status([RouterStatus.from_dict(each) for each in await self._call("expertmesh_status")])

    async def trace(self, reader: str = "") -> bytes:
        """A reader's sampled routing decisions as an .npz file; no bytes if nothing was recorded."""
        return (await self._call("expertmesh_trace", reader))[0]

    async def clear_trace(self, reader: str = "") -> None:
        """Let a reader of the sampled routing decisions begin anew."""
        await self._call("expertmesh_clear_trace", reader)

    async def end_trace(self, reader: str) -> None:
        """The reader is done."""
        await self._call("expertmesh_end_trace", reader)

    async def observation(self, go_on: bool) -> bytes:
        """What was observed since the last call, as an `Observation`'s bytes; no bytes if nothing was.

        `go_on`: whether to observe from now on.
        """
        return (await self._call("expertmesh_observation", go_on))[0]

    async def prompts(self) -> list[PromptSample]:
        """Prompts since the last call and what experts they took; the first call begins and has none."""
        return [PromptSample.from_dict(each) for each in (await self._call("expertmesh_prompts"))[0]]

    async def loads(self, watch_s: float) -> dict[str, Any]:
        """How many tokens picked each expert since counting began; see `StepRecorder.loads`."""
        return (await self._call("expertmesh_loads", watch_s))[0]

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """All workers' answers, by rank.

        The time-out is kept here: vLLM takes one too, but neither an engine in another process nor the executor of a
        single worker heeds it.
        """
        call = asyncio.ensure_future(self._collective_rpc(method, args=args))
        self._waiting.add(call)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._ended or (task is not None and task.cancelling()):
                raise
            raise EngineSilentError(f"the engine's worker did not answer {method}: {self._ended}") from None
        except TimeoutError:
            raise EngineSilentError(f"the engine's worker did not answer {method} in {self.timeout_s} s") from None
        finally:
            self._waiting.discard(call)
