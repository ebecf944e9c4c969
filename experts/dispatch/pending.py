"""What a dispatcher keeps of a layer between begin() and finish()."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from experts.dispatch.rows.base import DispatchPlan, RowBatch


@dataclass(slots=True)
class Pending:
    """A layer's dispatch between begin() and finish()."""

    rows: RowBatch
    """All of the layer's."""
    batch: RowBatch = field(init=False)
    """Those that are out at the shards now."""
    plan: DispatchPlan = field(init=False)
    """Of `batch`, as last posted."""
    stop: int = 0
    """The first row that was not sent yet."""
    posted: list[int] | None = field(init=False)
    failed: list[int] = field(init=False)
    """Ranks of `plan`'s messages: those that wait for a reply (None: all that it has a message for), and those that
    failed."""
    missing_slots: dict[int, int] | None = None
    """How often each rank had no slot for an expert of `batch`; None for never."""
    whole_TK: np.ndarray | None = None
    """The decisions of all rows, where other workers dispatch some of them."""

    @property
    def y_TD(self) -> torch.Tensor:
        """Where the sums will stand."""
        return self.rows.y_TD

    @property
    def decided_TK(self) -> np.ndarray:
        """The routing decisions of all rows in host memory (int32), until finish()."""
        return self.rows.topk_ids_TK if self.whole_TK is None else self.whole_TK

    @property
    def topk_ids_TK(self) -> np.ndarray:
        """Those of `decided_TK` that are dispatched here, -1 for the others."""
        return self.rows.topk_ids_TK

    def narrow(self, share: Callable[[np.ndarray], np.ndarray]) -> None:
        """Dispatch just the rows that `share` leaves of the decisions."""
        self.whole_TK = self.rows.topk_ids_TK
        self.rows.topk_ids_TK = share(self.whole_TK)

    def leave_out(self, refused_T: np.ndarray) -> None:
        """Dispatch none of the rows `refused_T` (bool)."""
        self.rows.topk_ids_TK = np.where(refused_T[:, None], np.int32(-1), self.rows.topk_ids_TK)
