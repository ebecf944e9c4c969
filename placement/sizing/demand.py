"""What is asked of a service: load, latencies, and how much room to leave."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from placement.sizing.errors import SizingError


@dataclass(frozen=True)
class Demand:
    """Load and limits.

    Attributes:
        isl: tokens of a prompt.
        osl: tokens of an answer.
        rate: requests a second, arriving at random (Poisson).
        tpot_ms: longest mean time between two tokens of an answer.
        ttft_ms: longest mean time to the first token.
        headroom: share of each GPU's memory that stays free, 0 to 0.9.
        spare_slots: slots of each layer and shard that stay empty, so that experts can move.
        lost_shards: how many shards may be lost with every expert still in a slot, and the limits still kept.
        skew: sigma of the lognormal popularity of experts; 0: all alike.
        kv_value_bytes: bytes of a value in the KV cache.
        max_gpus: where the search ends.
        router_gpus: GPUs of each router (tensor parallelism).
    """

    isl: int
    osl: int
    rate: float
    tpot_ms: float
    ttft_ms: float
    headroom: float = 0.25
    spare_slots: int = 1
    lost_shards: int = 1
    skew: float = 0.5
    kv_value_bytes: float = 2.0
    max_gpus: int = 512
    router_gpus: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise SizingError(f"{field.name} is {value}, expected a number")
        for name in ("isl", "osl", "max_gpus", "router_gpus"):
            if getattr(self, name) < 1:
                raise SizingError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("rate", "tpot_ms", "ttft_ms", "kv_value_bytes"):
            if not getattr(self, name) > 0:
                raise SizingError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.headroom <= 0.9:
            raise SizingError(f"headroom is {self.headroom}, expected a share from 0 to 0.9, such as 0.25")
        for name in ("spare_slots", "lost_shards"):
            if getattr(self, name) < 0:
                raise SizingError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.skew <= 3:
            raise SizingError(f"skew is {self.skew}, expected 0 (all experts alike) to 3")

    @property
    def context(self) -> int:
        """Tokens of a finished sequence."""
        return self.isl + self.osl

    @property
    def mean_context(self) -> float:
        """Tokens of a sequence on average while it is answered."""
        return self.isl + self.osl / 2

    @property
    def tokens_per_s(self) -> float:
        """Tokens through the layers, prompts included."""
        return self.rate * self.context
