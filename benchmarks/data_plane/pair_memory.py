"""Memory that a router's pairs with the shards of its host take: connected, in use, and idle again.

    python -m benchmarks.data_plane.pair_memory [--quick] [--shards 64] [--hidden 7168]

Pairs as a router has them, each for up to 2,048 rows of bfloat16, with the shards' ends in this process too. A row of
the table is what the pairs' memory was after messages of so many rows on every pair, as the kernel counts shared
memory of the whole machine (so nothing else that shares memory may start or stop meanwhile). "reserved" is what they
would take if all of it were allocated with the pair.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save
from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.wire import HEADER_BYTES, request_layout
from experts.transports.base import RouterLink, ShardChannel
from experts.transports.connect import connect, open_shard_channel
from experts.transports.control import Hello
from experts.transports.control_port.listener import ControlListener
from experts.transports.shm import ShmDoorbell

TOP_K, MAX_ROWS = 8, 2048
LIMIT_S = 60.0
GOAL_MB = 500.0  # of a router of 64 shards and hidden 7168 that decodes, against 3,800 reserved


def _shared_mb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError("/proc/meminfo has no Shmem")


def _exchange(links: list[RouterLink], channels: list[ShardChannel], rows: int, row_bytes: int) -> None:
    """One message of `rows` rows on each pair, written and answered in full."""
    nbytes, answer = request_layout(rows, rows * TOP_K, row_bytes)[-1], HEADER_BYTES + rows * row_bytes
    for link in links:
        link.send_buffer[:nbytes] = 1
        link.post(nbytes)
    for channel in channels:
        if channel.poll() != nbytes:
            raise RuntimeError("a request did not arrive as it was sent")
        channel.send_buffer[:answer] = 2
        channel.reply(answer)
    for link in links:
        link.wait(time.monotonic() + LIMIT_S)


def measure(shards: int, hidden: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    bell = ShmDoorbell(50.0)
    channels: list[ShardChannel] = []
    listener = ControlListener(
        "127.0.0.1",
        lambda hello, line: open_shard_channel(hello, line, bell, "cpu", time.monotonic() + LIMIT_S),
        channels.append,
        channels.remove,
        LIMIT_S,
    )
    endpoint = ShardEndpoint(0, "1", "127.0.0.1", listener.port, host_id(), 0)
    before_mb = _shared_mb()
    hellos = [Hello(f"r{number}", "shm", "1", "bfloat16", hidden, TOP_K, 1, MAX_ROWS) for number in range(shards)]
    links = [connect(endpoint, hello, "cpu", 50.0, time.monotonic() + LIMIT_S) for hello in hellos]
    reserved_mb = shards * (hellos[0].request_capacity + hellos[0].reply_capacity) / 1e6
    found = []

    def note(what: str) -> None:
        found.append({"after": what, "taken_mb": _shared_mb() - before_mb, "reserved_mb": reserved_mb})

    note("connecting")
    for rows in (64, MAX_ROWS, 64):
        _exchange(links, channels, rows, hellos[0].row_bytes)
        note(f"{rows} rows")
    for what in ("a trim", "a trim while idle"):
        for link in links:
            link.trim()
        note(what)
    for link in links:
        link.close()
    listener.stop()
    return found


def main() -> None:
    """Print the table and write bench-results/pair_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--hidden", type=int, default=7168)
    args = parser.parse_args()
    shards = args.shards or (4 if args.quick else 64)
    rows = measure(shards, args.hidden)
    print_table(
        f"Memory of {shards} pairs at hidden {args.hidden}", list(rows[0]), [list(row.values()) for row in rows]
    )
    save("pair_memory", {"shards": shards, "hidden": args.hidden, "goal_mb": GOAL_MB, "rows": rows})


if __name__ == "__main__":
    main()
