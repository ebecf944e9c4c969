"""GPUs by name: data sheets' figures in JSON, and what of them kernels and links reach."""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from placement.capacity.hardware import Constants
from placement.sizing.errors import SizingError
from placement.topology import Link, Links

TABLE = Path(__file__).with_name("gpus.json")
MIB = 1 << 20

# The shares of nominal rates that `placement.capacity.hardware.H100` assumes, and its fixed costs of a layer.
_MEMORY_SHARE, _FLOPS_SHARE, _LINK_SHARE = 0.8, 0.6, 0.9
_CALL_S, _ROUTER_S, _ROUTER_TOKEN_S = 12e-6, 25e-6, 0.05e-6


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `ray` is Ray's accelerator_type; rates are data sheets', of one GPU and one direction."""

    name: str
    title: str
    ray: str
    memory_mib: int
    memory_gb_per_s: float
    bf16_tflops: float
    node_gb_per_s: float
    network_gb_per_s: float
    gpus_per_node: int
    notes: str = ""

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB

    @property
    def constants(self) -> Constants:
        """What routers and shards reach on it: shares of the data sheet's rates, estimated fixed costs."""
        return Constants(
            _MEMORY_SHARE * self.memory_gb_per_s * 1e9,
            _FLOPS_SHARE * self.bf16_tflops * 1e12,
            _CALL_S,
            _ROUTER_S,
            _ROUTER_TOKEN_S,
            f"{self.title}, nominal",
        )

    @property
    def links(self) -> Links:
        """Links within a node and between nodes, with the latencies that `Links` assumes."""
        latency = Links()
        network = _LINK_SHARE * self.network_gb_per_s * 1e9
        return Links(
            node=Link(bandwidth_bytes_per_s=_LINK_SHARE * self.node_gb_per_s * 1e9, latency_s=latency.node.latency_s),
            rack=Link(bandwidth_bytes_per_s=network, latency_s=latency.rack.latency_s),
            cluster=Link(bandwidth_bytes_per_s=network, latency_s=latency.cluster.latency_s),
        )


@functools.cache
def gpus() -> dict[str, Gpu]:
    """The table by name."""
    return {entry["name"]: Gpu(**entry) for entry in json.loads(TABLE.read_text())["gpus"]}


def gpu_named(name: str) -> Gpu:
    """The GPU with this name, whatever its case. SizingError names the known ones."""
    known = gpus()
    found = known.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SizingError(f"GPU {name!r} is unknown, expected one of {', '.join(known)}{hint}")
    return found
