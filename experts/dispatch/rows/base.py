"""The interface of plan, pack and combine: what a dispatcher asks of whatever moves a step's rows.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size, M rows of one rank's message.

    stage          routing decisions to host memory, rows to where they travel from
    plan_and_pack  choose a rank for each (token, expert) pair, write every rank's message
    combine        add up the partial rows that came back
    send, receive  where a mover can: the same, posting and waiting included, in one compiled call each
    add            add rows that were computed elsewhere

A batch that lost a shard is planned, packed and combined again for the pairs that failed. How the sums of the first
attempt are kept meanwhile is the mover's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from experts.dispatch.stats import RouterStats


class RowBatch:
    """Rows of one layer, and their sums: all of a step's, or as many as one message to each rank may carry."""

    __slots__ = ("_ids_TK", "_weights_TK", "_y_TD", "addresses", "layer", "num_tokens", "repeated", "sum_TD", "x_TD")

    def __init__(
        self,
        layer: int,
        num_tokens: int,
        x_TD: torch.Tensor,
        topk_ids_TK: np.ndarray | torch.Tensor,
        topk_weights_TK: np.ndarray | torch.Tensor,
        addresses: tuple[int, int, int] | None = None,
        y_TD: torch.Tensor | None = None,
    ) -> None:
        """x is contiguous. Ids (int32, logical experts; -1 where a pair is not wanted) and weights (float32) are in
        host memory; arrays of tensors, and y, are made when somebody asks for them: the shards compute by then.

        `addresses` of x, ids and weights, if they are in host memory.
        """
        self.layer, self.num_tokens, self.x_TD, self._y_TD = layer, num_tokens, x_TD, y_TD
        self._ids_TK, self._weights_TK, self.addresses = topk_ids_TK, topk_weights_TK, addresses
        self.repeated = False
        """y already holds the sums of an earlier attempt; combining adds to them."""
        self.sum_TD: torch.Tensor | None = None
        """float32: y before it is rounded, for movers that keep it."""

    @property
    def y_TD(self) -> torch.Tensor:
        """Where the sums go, in x's dtype and on x's device."""
        if self._y_TD is None:
            self._y_TD = torch.empty_like(self.x_TD)
        return self._y_TD

    @property
    def topk_ids_TK(self) -> np.ndarray:
        """int32, logical experts; -1 where a pair is not wanted, or no longer."""
        if isinstance(self._ids_TK, torch.Tensor):
            self._ids_TK = self._ids_TK.numpy()
        return self._ids_TK

    @topk_ids_TK.setter
    def topk_ids_TK(self, ids_TK: np.ndarray) -> None:
        self._ids_TK, self.addresses = ids_TK, None

    @property
    def topk_weights_TK(self) -> np.ndarray:
        """float32."""
        if isinstance(self._weights_TK, torch.Tensor):
            self._weights_TK = self._weights_TK.numpy()
        return self._weights_TK

    def part(self, start: int, stop: int) -> RowBatch:
        """The rows from `start` up to `stop`; views."""
        if stop - start == self.num_tokens:
            return self
        x_TD, y_TD = self.x_TD[start:stop], self.y_TD[start:stop]
        ids_TK, weights_TK = self.topk_ids_TK[start:stop], self.topk_weights_TK[start:stop]
        return RowBatch(self.layer, stop - start, x_TD, ids_TK, weights_TK, y_TD=y_TD)

    def narrow(self, wanted_TK: np.ndarray) -> None:
        """Keep only the pairs in `wanted_TK` (bool) for another attempt."""
        self.topk_ids_TK = np.where(wanted_TK, self.topk_ids_TK, np.int32(-1))
        self.repeated = True


@dataclass(slots=True)
class DispatchPlan:
    """Which pairs go to which rank. The arrays are the mover's own; its next plan overwrites them."""

    rank_TK: np.ndarray
    """int32: the rank of each pair, -1 if it is not wanted or no live rank has the expert."""
    row_TK: np.ndarray
    """int32: the token's row in that rank's message, at the first pair of a (token, rank); -1 at the others."""
    rows_R: np.ndarray
    """int32: rows of each rank's message."""
    pairs_R: np.ndarray
    """int32: pairs of each rank's message."""
    nbytes_R: np.ndarray
    """int64: length of each rank's message, 0 for none."""
    unserved: int = 0
    """Wanted pairs that no live rank can serve."""


class RowMover(ABC):
    """Moves one router's rows during one epoch. A batch is combined before the next one is packed."""

    @abstractmethod
    def carry_over(self, before: RowMover) -> None:
        """Go on from the mover of the epoch before: loads of the ranks that both have, and memory. Takes no time."""

    @abstractmethod
    def stage(
        self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> RowBatch:
        """A layer's rows where they travel from, its routing in host memory. Valid until the next call."""

    @abstractmethod
    def plan_and_pack(self, batch: RowBatch, seq: int, slots_ER: np.ndarray) -> DispatchPlan:
        """Write message `seq` to each rank that gets rows. `slots_ER` (int32) is -1 for no slot and for lost ranks."""

    @abstractmethod
    def count_into(self, stats: RouterStats) -> None:
        """Where `send` and `receive` count; called before the first of them."""

    def send(self, batch: RowBatch, seq: int, slots_LER: np.ndarray) -> DispatchPlan | None:
        """`plan_and_pack`, post and count at once. None if this mover cannot for these links; nothing was done then.

        What cannot be sent is noticed by whoever waits for its reply.
        """
        return None

    def receive(self, batch: RowBatch, plan: DispatchPlan, timeout_s: float) -> bool:
        """Wait for all replies to the last `send`, check, `combine` and count at once; whether all was as it should be.

        If it was not, nothing was combined or counted, and every link can be waited for again.
        """
        return False

    wants_hints = False
    """Whether a shard of this epoch would know what the next layer needs."""

    def hint(self, words: np.ndarray) -> None:
        """What later requests say of the layer after theirs (`protocol.wire.hint_words`, int64 [3])."""
        return None

    def time_into(self, words: np.ndarray | None) -> None:
        """Have `send` and `receive` note their times in `words` (`dispatch.tracing.times`); None: no more."""
        return None

    @abstractmethod
    def forget(self, rank: int) -> None:
        """The rank's link goes: its buffers are not touched any more. A message to it would be planned, not written."""

    @abstractmethod
    def combine(self, batch: RowBatch, plan: DispatchPlan, answered_R: np.ndarray) -> None:
        """y = the sum, in float32, of the partial rows of the ranks that answered (bool). `plan` is the latest."""

    @abstractmethod
    def add(self, batch: RowBatch, tokens_M: torch.Tensor, rows_MD: torch.Tensor) -> None:
        """y[tokens] += rows. `tokens_M` (int64, no token twice) and `rows_MD` are on y's device; after `combine`."""
