"""Which experts the rows of new prompts took: a few rows of each prompt, beside the tokens that its text begins and
ends with. So a router can say what a prompt's text says about its experts.

T tokens of a step, R sampled rows of a prompt, L layers, K experts of one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_PROMPTS = 64  # between two calls of `take`; older ones go
MOST_ROWS = 32  # of a prompt
LEAST_ROWS = 4  # fewer say little: the rest was in the prefix cache, or there is no more
EDGE_TOKENS = 256  # of a prompt's beginning, and as many of its end


@dataclass(frozen=True)
class PromptSample:
    """One prompt: `tokens`, its first and last ones, and `ids_RLK`, int16, the experts that some of its rows took, of
    `num_experts` in each layer."""

    tokens: list[int]
    ids_RLK: np.ndarray
    num_experts: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        shape = list(self.ids_RLK.shape)
        ids = self.ids_RLK.astype("<i2").tobytes()
        return {"tokens": self.tokens, "shape": shape, "ids": ids, "num_experts": self.num_experts}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PromptSample:
        """Inverse of `to_dict`."""
        ids_RLK = np.frombuffer(data["ids"], "<i2").reshape(data["shape"])
        return cls(list(data["tokens"]), ids_RLK, int(data["num_experts"]))


@dataclass(frozen=True)
class NewPrompt:
    """A prompt whose first rows are in a step: its token ids, and which rows of the step are its."""

    tokens: Sequence[int]
    first_row: int
    num_rows: int


class PromptSamples:
    """The samples of the prompts that came since the last `take`, the newest MOST_PROMPTS. For one thread at a time."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._kept: deque[PromptSample] = deque(maxlen=MOST_PROMPTS)

    def add(self, ids_TLK: np.ndarray, prompts: Sequence[NewPrompt]) -> None:
        """Sample the prompts of one step: int [T, L, K]. Nothing is kept of the array, nor of prompts beyond it."""
        for prompt in prompts[-MOST_PROMPTS:]:
            end = prompt.first_row + prompt.num_rows
            if prompt.num_rows < LEAST_ROWS or end > len(ids_TLK):
                continue
            count = min(prompt.num_rows, MOST_ROWS)
            rows_R = prompt.first_row + np.arange(count) * prompt.num_rows // count
            tokens = prompt.tokens
            if len(tokens) > 2 * EDGE_TOKENS:
                tokens = [*tokens[:EDGE_TOKENS], *tokens[-EDGE_TOKENS:]]
            self._kept.append(PromptSample(list(tokens), ids_TLK[rows_R].astype(np.int16), self._num_experts))

    def take(self) -> list[PromptSample]:
        """Those since the last call, the oldest first; begins anew."""
        taken = list(self._kept)
        self._kept.clear()
        return taken
