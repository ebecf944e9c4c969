"""Recording of routing in a stream: a sample of fixed size in which old tokens fade, and counts that fade alike.

T tokens of a batch, L layers, K experts of one token, E experts.
"""

from __future__ import annotations

import numpy as np

from placement.trace import ActivationTrace


class TraceRecorder:
    """Keeps `capacity` tokens of all that it is given, and counts of every expert.

    With `half_life_tokens` None the sample is uniform over the stream (Vitter's algorithm R). With a half-life the
    chance that a token is in the sample halves every so many tokens, and so do the counts: each token enters with a
    fixed chance and takes the place of a random one. A batch costs a few vector operations, whatever its size. One
    thread at a time.
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
        # A place is overwritten with chance p / capacity a token; it survives a half-life with chance 1/2.
        self._entry_chance = 1.0
        if half_life_tokens is not None:
            self._entry_chance = min(1.0, capacity * np.log(2) / half_life_tokens)
        self._ids_CLK = np.full((capacity, num_layers, top_k), -1, np.int16)
        self._counts_LE = np.zeros((num_layers, num_experts))
        self._layer_offset_L1 = (np.arange(num_layers) * num_experts)[None, :, None]
        self._filled = 0
        self._rng = np.random.default_rng(seed)

    @property
    def capacity(self) -> int:
        return len(self._ids_CLK)

    def add(self, topk_ids_TLK: np.ndarray) -> None:
        """Record a batch: int [T, L, K] logical experts, -1 where a token picked none; no padding, no warm-up tokens.

        Raises ValueError if the shape or an id does not fit. The array is not kept.
        """
        ids = np.asarray(topk_ids_TLK)
        if ids.ndim != 3 or ids.shape[1:] != self._ids_CLK.shape[1:]:
            raise ValueError(
                f"a batch must be [tokens, {self._ids_CLK.shape[1]}, {self._ids_CLK.shape[2]}], got {list(ids.shape)}"
            )
        if not len(ids):
            return
        if int(ids.max()) >= self.num_experts:
            raise ValueError(f"expert {int(ids.max())} is not one of {self.num_experts}")
        flat = (ids + self._layer_offset_L1)[ids >= 0] if int(ids.min()) < 0 else (ids + self._layer_offset_L1).ravel()
        if self._half_life_tokens is not None:
            self._counts_LE *= 0.5 ** (len(ids) / self._half_life_tokens)
        self._counts_LE += np.bincount(flat, minlength=self._counts_LE.size).reshape(self._counts_LE.shape)
        seen = self.tokens_seen
        self.tokens_seen += len(ids)
        fresh = min(self.capacity - self._filled, len(ids))
        if fresh:
            self._ids_CLK[self._filled : self._filled + fresh] = ids[:fresh]
            self._filled += fresh
            ids, seen = ids[fresh:], seen + fresh
        if not len(ids):
            return
        if self._half_life_tokens is None:
            place_T = self._rng.integers(0, np.arange(seen + 1, seen + len(ids) + 1))
            enters = np.flatnonzero(place_T < self.capacity)
            places = place_T[enters]
        else:
            enters = np.flatnonzero(self._rng.random(len(ids)) < self._entry_chance)
            places = self._rng.integers(0, self.capacity, len(enters))
        # numpy keeps the last of several writes to one place, as a token by token loop would.
        self._ids_CLK[places] = ids[enters]

    def snapshot(self) -> ActivationTrace:
        """The trace as it stands; a copy. Raises TraceError if nothing was recorded."""
        return ActivationTrace(
            self._ids_CLK[: self._filled].copy(),
            self.num_experts,
            self.layers,
            counts=np.rint(self._counts_LE).astype(np.int64) if self.tokens_seen else None,
        )

    def clear(self) -> None:
        """Forget everything recorded."""
        self._filled = 0
        self.tokens_seen = 0
        self._counts_LE[:] = 0
