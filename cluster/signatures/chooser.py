"""Which router gets a request: one whose prompts take the same experts, as far as loads are even enough.

N pairs, F features of a text, W numbers of a signature, R routers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from cluster.config.llm_sections import SignaturesSection
from cluster.signatures.loads import Loads
from cluster.signatures.memory import PromptMemory
from cluster.signatures.messages import SignatureReport
from cluster.signatures.partition import distances, partition
from cluster.signatures.text import features
from cluster.signatures.usage import WIDTH

LEAST_PROMPTS = 32  # fewer remembered ones make no groups
AGAIN_AFTER = 64  # prompts learnt since the groups were made
BAND = 0.1  # of the squared distance between groups: a request so near to the border goes where there is less to do


class Chooser:
    """The state of one request router: routers, their loads, remembered prompts, and a group of signatures a router.

    The same state and the same `rng` choose the same. What it holds is bounded by the routers there are and by
    `options.remembered_prompts`.
    """

    def __init__(self, options: SignaturesSection, rng: random.Random) -> None:
        self.loads = Loads()
        self._options, self._rng = options, rng
        self._memory = PromptMemory(options.remembered_prompts)
        self._routers: list[str] = []
        self._numbers: dict[str, int] = {}  # of the last report learnt from, by router
        self._computed: dict[str, np.ndarray] = {}  # mean signature of the prompts that it computed lately
        self._learnt = 0  # prompts since the groups were made
        self._centres_RW: np.ndarray | None = None
        self._band = 0.0

    def keep(self, routers: Sequence[str]) -> None:
        """The routers that there are now; what is known of others is forgotten, but for what their prompts taught."""
        if sorted(routers) == self._routers:
            return
        self._routers = sorted(routers)
        self.loads.keep(routers)
        for known in (self._numbers, self._computed):
            for router in known.keys() - set(routers):
                known.pop(router)  # type: ignore[attr-defined]
        self._make_groups()

    def learn(self, router: str, report: SignatureReport) -> bool:
        """What a router says it computed. A report that was learnt from already, or of a router gone, does nothing.

        Whether it made groups where there were none.
        """
        if router not in self._routers or self._numbers.get(router) == report.number:
            return False
        had_groups, is_new = self._centres_RW is not None, router not in self._numbers
        self._numbers[router] = report.number
        self._computed[router] = report.mean_W.astype(np.float32)
        self._memory.add(report.features_NF, report.signatures_NW)
        self._learnt += len(report.features_NF)
        if self._learnt >= AGAIN_AFTER or is_new or not had_groups:
            self._make_groups()
        return self._centres_RW is not None and not had_groups

    def choose(self, text: str, routers: Sequence[str]) -> str:
        """One of `routers`, whose load is then one more. ValueError if there are none.

        Its load is less than `max_lead` above the smallest one. Without a group that knows such texts, the less
        loaded of two by chance, as Serve does.
        """
        if not routers:
            raise ValueError("there is no router to choose")
        loads = {router: self.loads.of(router) for router in routers}
        most = min(loads.values()) + self._options.max_lead
        allowed = [router for router in sorted(loads) if loads[router] < most]
        distance = self._distances(text) if len(allowed) > 1 else None
        if distance is None or not all(router in distance for router in allowed):
            two = self._rng.sample(allowed, min(2, len(allowed)))
            chosen = min(two, key=lambda router: loads[router])
        else:
            best = min(distance[router] for router in allowed)
            near = [router for router in allowed if distance[router] <= best + self._band]
            chosen = min(near, key=lambda router: (loads[router], distance[router], router))
        self.loads.sent(chosen)
        return chosen

    def _distances(self, text: str) -> dict[str, float] | None:
        """Of the expected signature to each router's group; None without groups, or for a text unlike all others."""
        if self._centres_RW is None or not text:
            return None
        expected_W = self._memory.expected(features(text), self._options.min_similarity)
        if expected_W is None:
            return None
        found_R = distances(expected_W[None], self._centres_RW)[0].tolist()
        return dict(zip(self._routers, found_R, strict=True))

    def _make_groups(self) -> None:
        self._centres_RW = None
        signatures_MW = self._memory.signatures_MW
        if len(self._routers) < 2 or len(signatures_MW) < max(LEAST_PROMPTS, 2 * len(self._routers)):
            return
        # A router that has said nothing yet gets what is left: no signature is near to zeros.
        nothing_W = np.zeros(WIDTH, np.float32)
        near_RW = np.stack([self._computed.get(router, nothing_W) for router in self._routers])
        self._centres_RW = centres_RW = partition(signatures_MW, near_RW)
        apart_RR = distances(centres_RW, centres_RW)
        self._band = BAND * float(apart_RR.sum()) / (len(centres_RW) * (len(centres_RW) - 1))
        self._learnt = 0
