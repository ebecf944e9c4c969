"""Whether routers generate: what the health routes ask, and what they are told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class GenerationHealth:
    """Whether this router generates tokens with its experts on shards."""

    ok: bool
    router_id: str
    reason: str  # why not; empty if ok
    how: Literal["recent token", "probe"]  # what the answer rests on
    # None if the engine's worker did not say.
    epoch: int | None = None
    connected: list[int] | None = None  # ranks
    lost: dict[int, str] | None = None  # why there is no link, by rank
    start_s: dict[str, float] | None = None  # how long each part of the router's start took

    def to_dict(self) -> dict[str, Any]:
        """Plain data with these fields as keys, without those that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class HealthSource(Protocol):
    """What the health routes ask."""

    async def all_routers(self) -> tuple[list[GenerationHealth], list[str]]: ...

    async def ready(self) -> GenerationHealth: ...
