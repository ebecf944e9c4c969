"""What costs time in the expert layers: the shape of a model, and what shards and routers can do.

D hidden size, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ModelShape:
    """What costs time in a model: gated experts of three matrices D x I. The defaults are OLMoE-1B-7B in bf16."""

    hidden_size: int = 2048
    intermediate_size: int = 1024
    weight_bytes: float = 2.0
    activation_bytes: float = 2.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "weight_bytes", "activation_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return round(3 * self.hidden_size * self.intermediate_size * self.weight_bytes)

    @property
    def pair_flops(self) -> int:
        """Floating-point operations for one token in one expert."""
        return 6 * self.hidden_size * self.intermediate_size

    @property
    def row_bytes(self) -> float:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.activation_bytes


@dataclass(frozen=True)
class Constants:
    """What shards and routers can do, at speed 1.

    Attributes:
        memory_bytes_per_s: rate of reading weights.
        flops_per_s: rate of computing.
        call_s: fixed cost of one layer on a shard.
        router_s: fixed cost of one layer on a router, besides wire and experts: plan, pack, unpack, combine.
        router_token_s: the part of that which each token adds.
        router_row_s: the part that each row adds; a token has a row for every rank that it visits.
        row_s: what each row adds to a call on a shard, however few experts it wants.
        overlap: the share of the shorter of reading and computing that is hidden behind the longer: 1 where a call has
            many units that wait for different things (a GPU), 0 where one core does one after the other.
    """

    memory_bytes_per_s: float
    flops_per_s: float
    call_s: float
    router_s: float
    router_token_s: float
    name: str = "given"
    router_row_s: float = 0.0
    row_s: float = 0.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if not (self.memory_bytes_per_s > 0 and self.flops_per_s > 0):
            raise ValueError(
                f"memory_bytes_per_s {self.memory_bytes_per_s} and flops_per_s {self.flops_per_s} must be > 0"
            )
        if min(self.call_s, self.router_s, self.router_token_s, self.router_row_s, self.row_s) < 0:
            raise ValueError("call_s, row_s, router_s, router_token_s and router_row_s must not be negative")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}, expected 0 to 1")


def busy_seconds(
    activated_R: np.ndarray, pairs_R: np.ndarray, model: ModelShape, constants: Constants, speed_R: np.ndarray
) -> np.ndarray:
    """float64 [..., R]: reading the weights of activated experts and computing pairs, as far as both overlap."""
    weights_R = activated_R * (model.expert_bytes / constants.memory_bytes_per_s)
    flops_R = pairs_R * (model.pair_flops / constants.flops_per_s)
    return (np.maximum(weights_R, flops_R) + (1 - constants.overlap) * np.minimum(weights_R, flops_R)) / speed_R


# Nominal: four fifths of the 3.35 TB/s that an H100 SXM reads, three fifths of its 989 Tflop/s (dense, bf16). The fixed
# costs are estimates: two kernel launches on a shard, a few on a router.
H100 = Constants(2.7e12, 590e12, 12e-6, 25e-6, 0.05e-6, "H100, nominal")
# Measured by this project's benchmarks on one core of an AMD EPYC, bf16. shard_kernel: reading rate, peak, and the time
# of a call of one row beyond reading its weights. router_overhead: 4 shards, 1 to 64 tokens.
CPU_CORE = Constants(34e9, 430e9, 28e-6, 30e-6, 0.27e-6, "one EPYC core with AVX-512, measured", overlap=0.0)
# Measured by layer_cost (the run of docs/placement.md): float32, weights beyond the caches.
CPU_CORE_AVX2 = Constants(
    13.7e9, 102e9, 3e-6, 15e-6, 0.15e-6, "one EPYC core without AVX-512, measured", router_row_s=0.06e-6, overlap=0.0
)
