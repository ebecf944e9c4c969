"""Records the routing of a stream: a sample of fixed size in which old tokens fade, and counts that fade alike.

T tokens of a batch, L layers, K experts of one token, E experts.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.traces.trace import ActivationTrace
from placement.xorshift import next_random, random_below, random_state, random_unit


# Compiled: between the layers of a step numpy's code is not in the processor's caches, and a dozen small numpy calls
# took ten times as long there as a loop.
@compiled()
def _record(
    ids_TLK: np.ndarray,
    counts_LE: np.ndarray,
    sample_CLK: np.ndarray,
    filled: int,
    seen: int,
    fade: float,
    entry_chance: float,
    random_1: np.ndarray,
) -> tuple[int, int]:
    """Count and sample a batch; returns (places filled, tokens seen), or (-1, id) with nothing done for a bad id.

    Counts are multiplied by `fade` first. `entry_chance`: the chance of a token to enter once all places are filled; 0
    keeps the sample uniform.
    """
    num_tokens, num_layers, top_k = ids_TLK.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for k in range(top_k):
                if ids_TLK[t, layer, k] >= counts_LE.shape[1]:
                    return -1, np.int64(ids_TLK[t, layer, k])  # type: ignore[return-value]
    if fade != 1.0:
        counts_LE *= fade
    for t in range(num_tokens):
        wanted = 0
        for layer in range(num_layers):
            for k in range(top_k):
                expert = ids_TLK[t, layer, k]
                if expert >= 0:
                    counts_LE[layer, expert] += 1
                    wanted += 1
        if wanted == 0:
            continue
        seen += 1
        if filled < len(sample_CLK):
            place = filled
            filled += 1
        elif entry_chance == 0.0:
            place = np.int64(next_random(random_1) % np.uint64(seen))  # type: ignore[assignment]  # int() would stay unsigned
        elif random_unit(random_1) <= entry_chance:
            place = random_below(random_1, len(sample_CLK))
        else:
            continue
        if place < len(sample_CLK):
            sample_CLK[place] = ids_TLK[t]
    return filled, seen


class TraceRecorder:
    """Keeps a sample of `capacity` tokens of a stream, and counts of every expert. For one thread at a time.

    With `half_life_tokens` None the sample is uniform over the stream (Vitter's algorithm R). With a half-life, the
    chance that a token is in the sample halves every so many tokens, and so do the counts: each token enters with a
    fixed chance and takes the place of a random one. Until a uniform sample's chance has fallen to that one, nothing
    fades: the first tokens would else count for more than those that come later.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        top_k: int,
        capacity: int = 20_000,
        half_life_tokens: float | None = None,
        seed: int = 0,
        layers: tuple[int, ...] = (),
    ) -> None:
        if min(num_layers, num_experts, top_k, capacity) < 1:
            raise ValueError(
                f"{num_layers} layers, {num_experts} experts, top-{top_k}, capacity {capacity}: each must be at least 1"
            )
        if half_life_tokens is not None and half_life_tokens <= 0:
            raise ValueError(f"half_life_tokens is {half_life_tokens}, expected more than 0")
        self.num_experts = num_experts
        self.layers = layers or tuple(range(num_layers))
        self.tokens_seen = 0
        self._half_life_tokens = half_life_tokens
        # A token overwrites a place with chance p / capacity; the place survives a half-life with chance 1/2.
        self._entry_chance = 0.0
        if half_life_tokens is not None:
            self._entry_chance = min(1.0, capacity * np.log(2) / half_life_tokens)
        self._ids_CLK = np.full((capacity, num_layers, top_k), -1, np.int16)
        self._counts_LE = np.zeros((num_layers, num_experts))
        self._filled = 0
        self._random_1 = random_state(seed)
        # Load or compile the machine code now, for the layout of live batches, so that no step of a server pays for it.
        self.add(np.full((num_layers, 1, top_k), -1, np.int16).transpose(1, 0, 2))

    @property
    def capacity(self) -> int:
        return len(self._ids_CLK)

    @property
    def counts_LE(self) -> np.ndarray:
        """int64 [L, E]: how many tokens picked each expert; those of long ago count for less, if they fade."""
        return np.rint(self._counts_LE).astype(np.int64)

    def add(self, topk_ids_TLK: np.ndarray) -> None:
        """Record a batch: int [T, L, K] logical experts, -1 where a token picked none; no warm-up tokens.

        A token without experts in any layer is padding and left out. The array is not kept. Raises ValueError if the
        shape or an id does not fit.
        """
        ids = np.asarray(topk_ids_TLK)
        if ids.ndim != 3 or ids.shape[1:] != self._ids_CLK.shape[1:]:
            raise ValueError(
                f"a batch must be [tokens, {self._ids_CLK.shape[1]}, {self._ids_CLK.shape[2]}], got {list(ids.shape)}"
            )
        if ids.dtype != np.int16:
            ids = np.clip(ids, -1, np.iinfo(np.int16).max).astype(np.int16)
        fades = self._half_life_tokens is not None and self.tokens_seen * self._entry_chance >= self.capacity
        fade = 0.5 ** (len(ids) / self._half_life_tokens) if fades else 1.0  # type: ignore[operator]
        filled, seen = _record(
            ids,
            self._counts_LE,
            self._ids_CLK,
            self._filled,
            self.tokens_seen,
            fade,
            self._entry_chance if fades else 0.0,
            self._random_1,
        )
        if filled < 0:
            raise ValueError(f"expert {seen} is not one of {self.num_experts}")
        self._filled, self.tokens_seen = filled, seen

    def snapshot(self) -> ActivationTrace:
        """A copy of the trace so far. Raises TraceError if nothing was recorded."""
        return ActivationTrace(
            self._ids_CLK[: self._filled].copy(),
            self.num_experts,
            self.layers,
            counts=self.counts_LE if self.tokens_seen else None,
        )

    def clear(self) -> None:
        """Forget everything recorded."""
        self._filled = 0
        self.tokens_seen = 0
        self._counts_LE[:] = 0
