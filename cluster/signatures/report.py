"""A router's end: it asks its engine for new prompts again and again, and keeps what it will tell request routers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from cluster.signatures.messages import MOST_PAIRS, SignatureReport
from cluster.signatures.text import BUCKETS, features
from cluster.signatures.usage import WIDTH, signature
from placement.traces.prompts import PromptSample

logger = logging.getLogger("ray.serve")

FADE = 1 / 64  # of the mean, with each prompt


class Signatures:
    """What one router knows of its prompts. `take` gives new ones, and `text_of_tokens` their text."""

    def __init__(
        self,
        take: Callable[[], Awaitable[list[PromptSample]]],
        text_of_tokens: Callable[[list[int]], str],
    ) -> None:
        self._take, self._text_of_tokens = take, text_of_tokens
        self._pairs: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=MOST_PAIRS)
        self._mean_W: np.ndarray | None = None
        self._number = 0
        self._told: dict[str, Any] = {}

    async def follow(self, period_s: float) -> None:
        """Ask until cancelled. What goes wrong is logged: a router serves without it."""
        while True:
            try:
                self.add(await self._take())
            except Exception as error:
                logger.info("no prompts were looked at: %r", error)
            await asyncio.sleep(period_s)

    def add(self, samples: list[PromptSample]) -> None:
        """Make pairs of prompts that were computed."""
        for sample in samples:
            signature_W = signature(sample.ids_RLK, sample.num_experts)
            features_F = features(self._text_of_tokens(sample.tokens))
            if not signature_W.any() or not features_F.any():
                continue
            self._pairs.append((features_F, signature_W))
            mean_W = signature_W.astype(np.float64) if self._mean_W is None else self._mean_W
            self._mean_W = mean_W + FADE * (signature_W - mean_W)

    def stats(self) -> dict[str, Any]:
        """A SignatureReport of the prompts since the last call, as statistics.

        Without new ones it is the last one again: Serve hands statistics on when they change.
        """
        if self._pairs and self._mean_W is not None:
            features_NF = np.stack([pair[0] for pair in self._pairs]).reshape(-1, BUCKETS)
            signatures_NW = np.stack([pair[1] for pair in self._pairs]).reshape(-1, WIDTH)
            self._pairs.clear()
            self._number += 1
            mean_W = np.rint(self._mean_W).astype(np.int8)
            self._told = SignatureReport(self._number, mean_W, features_NF, signatures_NW).to_stats()
        return self._told
