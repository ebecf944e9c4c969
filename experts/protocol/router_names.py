"""How the processes of a router call themselves at shards: a router of several workers has a pair for each of them."""

from __future__ import annotations

_MARK = "#"


def process_name(router_id: str, worker: int) -> str:
    """The name in the hello of worker `worker`; the first one has the router's own.

    >>> process_name("a1b2", 0), process_name("a1b2", 1)
    ('a1b2', 'a1b2#1')
    """
    return f"{router_id}{_MARK}{worker}" if worker else router_id


def router_of(process: str) -> str:
    """The router's name of a `process_name`."""
    router_id, mark, worker = process.rpartition(_MARK)
    return router_id if mark and worker.isdigit() else process
