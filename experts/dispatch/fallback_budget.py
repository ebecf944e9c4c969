"""The fallback with a measure: what no shard holds is computed here, for so long a step, from so many cached bytes.

Legend: T tokens, K top-k, M some of the tokens, D hidden size.

Reading and dequantizing happen in a thread of their own, by demand: a step waits no longer than it has time left, and
what comes too late is there for the next one. Rows that no time was left for are refused: they leave without the
experts that they lack, and whoever drives the engine must end their requests.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict

import torch

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.fallback import weighted_expert
from experts.model.spec import ExpertWeights

logger = logging.getLogger(__name__)

RETRY_S = 5.0  # an expert that could not be read is tried again after this
CHUNK_ROWS = 64  # computed between two looks at the clock


class FallbackBudget:
    """Computes any expert of a checkpoint while there is time. The engine's thread calls it; another one reads."""

    def __init__(
        self, checkpoint: ExpertCheckpoint, dtype: torch.dtype, device: str, cache_bytes: int, max_ms_per_step: float
    ) -> None:
        """`cache_bytes` of weights are kept on `device`; `max_ms_per_step` is for all layers of a step."""
        self.spec = checkpoint.spec
        self.spent_ns = 0  # since the start
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = torch.device(device)
        self._cache_bytes = cache_bytes
        self.max_ns_per_step = round(max_ms_per_step * 1e6)
        self._left_ns = self.max_ns_per_step
        self._changed = threading.Condition()
        self._cache: OrderedDict[tuple[int, int], ExpertWeights] = OrderedDict()
        self._cached_bytes = 0
        self._wanted: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._failed_s: dict[tuple[int, int], float] = {}  # when an expert could not be read
        self._awaited: tuple[tuple[int, int], ExpertWeights | None] | None = None
        self._reading: tuple[int, int] | None = None
        self._reader_runs = False
        self._closed = False

    @property
    def cached_bytes(self) -> int:
        """Bytes of weights that are at hand."""
        return self._cached_bytes

    def start_step(self) -> None:
        """A new step has its time before it."""
        self._left_ns = self.max_ns_per_step

    def forward(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted sums in x's dtype [T, D], which rows lack an expert for want of time: bool [T] in host memory).

        `topk_ids_TK`, in host memory, holds logical experts, -1 where a pair is not wanted. The sum of a row that lacks
        one may be anything.
        """
        start_ns = time.monotonic_ns()
        deadline_ns = start_ns + self._left_ns
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        refused_T = torch.zeros(len(topk_ids_TK), dtype=torch.bool)
        experts = [int(expert) for expert in topk_ids_TK.unique().tolist() if expert >= 0]
        self._want(layer, experts)
        for expert in experts:
            has_TK = (topk_ids_TK == expert) & ~refused_T[:, None]
            if not has_TK.any():
                continue
            weights = self._await(layer, expert, deadline_ns)
            token_M, k_M = torch.where(has_TK)
            for start in range(0, len(token_M), CHUNK_ROWS):
                token_m, k_m = token_M[start : start + CHUNK_ROWS], k_M[start : start + CHUNK_ROWS]
                if weights is None or time.monotonic_ns() >= deadline_ns:
                    refused_T[token_m] = True
                    continue
                token_m, k_m = token_m.to(x_TD.device), k_m.to(x_TD.device)
                out_md = weighted_expert(x_TD[token_m], topk_weights_TK[token_m, k_m], weights, self.spec)
                y_TD.index_add_(0, token_m, out_md)
        spent_ns = time.monotonic_ns() - start_ns
        self.spent_ns += spent_ns
        self._left_ns = max(self._left_ns - spent_ns, 0)
        return y_TD.to(x_TD.dtype), refused_T

    def close(self) -> None:
        """Read no more."""
        with self._changed:
            self._closed = True
            self._wanted.clear()

    def _want(self, layer: int, experts: list[int]) -> None:
        """Have what is not cached read; what was asked for last comes first. What is cached counts as used."""
        with self._changed:
            for expert in experts:
                key = (layer, expert)
                if key in self._cache:
                    self._cache.move_to_end(key)
                else:
                    self._ask_for(key)

    def _ask_for(self, key: tuple[int, int]) -> None:
        if self._closed or self._has_failed(key) or key == self._reading:
            return
        self._wanted[key] = None
        self._wanted.move_to_end(key)
        if not self._reader_runs:
            self._reader_runs = True
            threading.Thread(target=self._read, name="fallback-reader", daemon=True).start()

    def _has_failed(self, key: tuple[int, int]) -> bool:
        return time.monotonic() - self._failed_s.get(key, -math.inf) < RETRY_S

    def _await(self, layer: int, expert: int, deadline_ns: int) -> ExpertWeights | None:
        """An expert's weights once they are there; None if the deadline comes first, or they cannot be read."""
        key = (layer, expert)
        with self._changed:
            self._awaited = (key, self._cache.get(key))
            try:
                while self._awaited[1] is None and not self._has_failed(key) and time.monotonic_ns() < deadline_ns:
                    self._ask_for(key)
                    self._changed.wait(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
                return self._awaited[1]
            finally:
                self._awaited = None

    def _read(self) -> None:
        """The thread: read what is wanted, and end once that is nothing."""
        while True:
            with self._changed:
                self._reading = None
                if not self._wanted:
                    self._reader_runs = False
                    return
                key, _ = self._wanted.popitem()
                self._reading = key
            try:
                weights = self._checkpoint.read_expert(*key, self._dtype).to(self._device)
            except Exception:  # a damaged file costs the requests that need it, not the engine
                logger.exception("expert %d of layer %d cannot be read", key[1], key[0])
                with self._changed:
                    self._failed_s[key] = time.monotonic()
                    self._changed.notify_all()
                continue
            with self._changed:
                self._keep(key, weights)
                self._changed.notify_all()

    def _keep(self, key: tuple[int, int], weights: ExpertWeights) -> None:
        if self._awaited is not None and self._awaited[0] == key:
            self._awaited = (key, weights)
        if weights.nbytes > self._cache_bytes:
            return
        while self._cached_bytes + weights.nbytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        self._cache[key] = weights
        self._cached_bytes += weights.nbytes
