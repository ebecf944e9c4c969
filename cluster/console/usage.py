"""What each key has used: of everybody for an admin, of themselves for everyone else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cluster.http.gate import key_in
from cluster.keys.deployment import usage_of
from cluster.keys.leases import RouterKeys
from cluster.keys.messages import LedgerUsage, Totals
from cluster.router.client import RouterClient

ROUTERS_TIMEOUT_S = 5.0
LEDGER_TIMEOUT_S = 2.0

USAGE: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {"usage": lambda app: app.get("/usage")}


class Usage:
    """The handlers of USAGE. `ledgers`: for each of `routers` the handle of the ledger that they count with, which need
    not exist; the same one where applications count together."""

    def __init__(self, routers: Sequence[RouterClient], ledgers: Sequence[Any]) -> None:
        self._routers, self._ledgers = routers, ledgers

    async def usage(self, request: Request) -> JSONResponse:
        """Requests and tokens of each key since the ledger started; a client's key sees its own."""
        routers, ledgers, errors = await self._ask()
        totals = _totals(routers, ledgers)
        key = key_in(request.scope)
        since_s = min((ledger.since_s for ledger in ledgers), default=None)
        body: dict[str, Any] = {
            "since": None if since_s is None else datetime.fromtimestamp(since_s, UTC).isoformat(timespec="seconds"),
            "complete": not errors,
        }
        if key is not None and key.role != "admin":
            return JSONResponse({**body, "keys": {key.name: asdict(totals.get(key.name, Totals()))}})
        return JSONResponse(
            {
                **body,
                "keys": {name: asdict(each) for name, each in sorted(totals.items())},
                "routers": {one.router_id: {"limits_by": one.limits_by, "problem": one.problem} for one in routers},
                "errors": errors,
            }
        )

    async def _ask(self) -> tuple[list[RouterKeys], list[LedgerUsage], list[str]]:
        """(what routers say, what ledgers say, one line for each that does not answer)."""
        answers = await asyncio.gather(*(client.keys(timeout_s=ROUTERS_TIMEOUT_S) for client in self._routers))
        errors = [error for _, missing in answers for error in missing]
        asked = {
            id(ledger): ledger  # once, if several applications have it
            for ledger, (found, _) in zip(self._ledgers, answers, strict=False)
            if not found or any(one.limits_by != "nothing" for one in found)  # others have no ledger
        }.values()
        said = await asyncio.gather(*(usage_of(one, LEDGER_TIMEOUT_S) for one in asked), return_exceptions=True)
        errors += ["the ledger of keys does not answer" for one in said if isinstance(one, BaseException)]
        return (
            [router for found, _ in answers for router in found],
            [one for one in said if isinstance(one, LedgerUsage)],
            errors,
        )


def _totals(routers: Sequence[RouterKeys], ledgers: Sequence[LedgerUsage]) -> dict[str, Totals]:
    """By key. What a router says itself is newer than what the ledger has heard of it."""
    by_router = {name: usage for ledger in ledgers for name, usage in ledger.routers.items()}
    by_router |= {one.router_id: one.usage for one in routers}
    totals: dict[str, Totals] = {}
    for usage in by_router.values():
        for key, each in usage.items():
            totals[key] = totals.get(key, Totals()) + each
    return totals
