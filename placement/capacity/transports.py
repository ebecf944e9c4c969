"""What a pair costs on each transport: a table, with the source of every figure.

Measured by `python -m benchmarks.data_plane.layer_cost` and `transport_pingpong`, less the copies into and out of
buffers, which `Constants.router_row_s` and `row_s` have. What GPUs do is estimated until one has run it.
"""

from __future__ import annotations

from typing import NamedTuple

from placement.topology import Link, Links


class Transport(NamedTuple):
    """One kind of pair; `reaches` is a rank's node or the cluster, `measured` is False for an estimate."""

    name: str
    link: Link
    reaches: str
    measured: bool
    source: str


_TABLE = (
    Transport(
        "shm", Link(bandwidth_bytes_per_s=30e9, latency_s=1.2e-6), "node", True,
        "layer_cost, 2 EPYC cores: 1.0 to 3.3 us one way; beyond the copies, bytes could be measured in one of many "
        "runs (28 GB/s)",
    ),
    Transport(
        "tcp", Link(bandwidth_bytes_per_s=2e9, latency_s=12e-6), "cluster", True,
        "layer_cost on loopback, 2 EPYC cores: 7.6 to 15.5 us one way; transport_pingpong: 1 MiB each way in 1,046 us. "
        "Between hosts the adapter's rate bounds it, if that is less",
    ),
    Transport(
        "cuda_ipc", Link(bandwidth_bytes_per_s=400e9, latency_s=5e-6, message_s=3e-6), "node", False,
        "estimate: 0.9 of an H100's 450 GB/s of NVLink, and a launch for each message",
    ),
    Transport(
        "nccl", Link(bandwidth_bytes_per_s=45e9, latency_s=20e-6, message_s=2e-6), "cluster", False,
        "estimate: 0.9 of a 400 Gbit/s adapter, a grouped send and receive; 2 us more for each peer of the group",
    ),
)  # fmt: skip
TRANSPORTS = {transport.name: transport for transport in _TABLE}


def transport_links(within_node: str, beyond: str) -> Links:
    """Links for `Topology`: one transport between ranks of a node, one to other nodes, whatever the rack.

    Raises ValueError for a name that is not in the table, or a transport that does not leave the node `beyond` it.
    """
    for name in (within_node, beyond):
        if name not in TRANSPORTS:
            raise ValueError(f"transport is {name!r}, expected one of {', '.join(TRANSPORTS)}")
    if TRANSPORTS[beyond].reaches == "node":
        raise ValueError(f"{beyond} does not reach other nodes")
    near, far = TRANSPORTS[within_node].link, TRANSPORTS[beyond].link
    return Links(node=near, rack=far, cluster=far)
