"""How the HTTP side asks all routers: the answers that come, and one line of error for each router without one."""

from __future__ import annotations

from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.http.errors import UnavailableError
from cluster.http.health import GenerationHealth
from cluster.keys.leases import RouterKeys
from cluster.ray_joints import NoReplicaError, broadcast
from cluster.router.messages import RouterLive, TraceSample
from experts.protocol.status import RouterStatus


class RouterLostError(UnavailableError):
    """A router that the answer needs did not answer; the message has a line for each one."""


class RouterClient:
    """Methods of all routers of one application. Answers come in no order."""

    def __init__(self, routers: DeploymentHandle, prefill: DeploymentHandle | None = None) -> None:
        """`prefill`: those of the prefill pool, asked as long as the others say that there are pools."""
        self._routers = routers
        self._prefill = prefill
        self._pools: bool | None = None if prefill is not None else False  # None: nobody has said yet

    async def statuses(self, *, timeout_s: float) -> tuple[list[RouterStatus], list[str]]:
        """(statuses, one line for each router without one)."""
        found, errors = await self.ask_each("mesh_status", timeout_s)
        return await self._with_prefill(found, errors, found, "mesh_status", timeout_s)

    async def live(self, watch_s: float, *, timeout_s: float) -> tuple[list[RouterLive], list[str]]:
        """(what each router shows, one line for each without an answer). `watch_s`: see `Router.mesh_live`."""
        found, errors = await self.ask_each("mesh_live", timeout_s, watch_s)
        return await self._with_prefill(found, errors, [live.status for live in found], "mesh_live", timeout_s, watch_s)

    async def generation_health(self, *, timeout_s: float) -> tuple[list[GenerationHealth], list[str]]:
        """(healths, one line for each router without one)."""
        return await self.ask_each("generation_health", timeout_s)

    async def keys(self, *, timeout_s: float) -> tuple[list[RouterKeys], list[str]]:
        """(what routers know of the usage of keys, one line for each router without an answer)."""
        return await self.ask_each("mesh_keys", timeout_s)

    async def traces(self, reader: str = "", *, timeout_s: float) -> list[TraceSample]:
        """What all routers sampled for a reader. Raises RouterLostError."""
        return await self._ask_all("mesh_trace", timeout_s, reader)

    async def clear_traces(self, reader: str = "", end: bool = False, *, timeout_s: float) -> list[bool]:
        """A reader begins anew at all routers, or ends; whether each of them records at all. Raises RouterLostError."""
        return await self._ask_all("mesh_clear_trace", timeout_s, reader, end)

    async def ask_each(
        self, method: str, timeout_s: float, *args: Any, of: DeploymentHandle | None = None
    ) -> tuple[list[Any], list[str]]:
        """(answers that come within `timeout_s`, one line for each router that fails or is silent).

        Of those that take requests; `of` others.
        """
        try:
            answers = await broadcast(of or self._routers, method, timeout_s, *args)
        except Exception as error:
            return [], [_why(error, "the routers", method, timeout_s)]
        errors = [_why(a, "a router", method, timeout_s) for a in answers if isinstance(a, BaseException)]
        return [answer for answer in answers if not isinstance(answer, BaseException)], errors

    async def _with_prefill(
        self,
        answers: list[Any],
        errors: list[str],
        statuses: list[RouterStatus],
        method: str,
        timeout_s: float,
        *args: Any,
    ) -> tuple[list[Any], list[str]]:
        """Answers and errors with those of the prefill pool, if the statuses say that there is one."""
        if statuses and self._prefill is not None:
            self._pools = any(status.pool for status in statuses)
        if not self._pools:
            return answers, errors
        more, more_errors = await self.ask_each(method, timeout_s, *args, of=self._prefill)
        return answers + more, errors + more_errors

    async def _ask_all(self, method: str, timeout_s: float, *args: Any) -> list[Any]:
        if self._pools is None:
            await self.statuses(timeout_s=timeout_s)
        answers, errors = await self.ask_each(method, timeout_s, *args)
        answers, errors = await self._with_prefill(answers, errors, [], method, timeout_s, *args)
        if errors:
            raise RouterLostError("; ".join(errors))
        return answers


def _why(error: BaseException, who: str, method: str, timeout_s: float) -> str:
    """One line on a call without an answer."""
    cause = getattr(error, "cause", None) or error  # Ray's errors carry what was raised on the other side
    if isinstance(cause, DeploymentUnavailableError | NoReplicaError):
        return "no router is available"
    if isinstance(cause, TimeoutError):
        return f"{who} did not answer {method} in {timeout_s:g} s"
    return f"{who} failed at {method}: {type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
