"""Serve LLM's request router by prefixes, told of what it chose.

Behind HAProxy a request router only names a replica: the request itself goes past it, and Serve (2.60) does not call
`on_request_routed`, from which `PrefixCacheAffinityRouter` learns who has which prefix. So there it would choose as if
it had never seen a request. tests/cluster/router/test_request_routing.py says when Serve does better.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.llm.request_router import PrefixCacheAffinityRouter


class PrefixRouter(PrefixCacheAffinityRouter):
    """Routes to who has the longest known prefix, or to who has the fewest; by load once that is too uneven."""

    async def _prefix_match_best_replicas(self, pending_request: Any, candidate_replicas: list[Any]) -> list[list[Any]]:
        """One list with the replica that gets the request; empty where load is to decide."""
        try:
            [chosen] = await super()._prefix_match_best_replicas(pending_request, candidate_replicas)
        except KeyError:  # the tree, which all request routers share, knows a replica that came or went just now
            return [[]]
        except ValueError:  # no text, as in Serve's own proxy, where HAProxy sends what it has no router for just now
            return [[]]
        if not chosen:
            return [[]]
        replica = random.choice(chosen)
        self.on_request_routed(pending_request, replica.replica_id, None)
        return [[replica]]
