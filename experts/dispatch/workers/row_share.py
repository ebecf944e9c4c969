"""Which rows of a step one worker of a tensor-parallel router dispatches: every `num_workers`-th one.

Legend: T tokens, K top-k.

vLLM gives all rows of a layer to every worker and adds up what the workers return. So each row must be computed by one
of them, and be zero at the others.
"""

from __future__ import annotations

import numpy as np

from experts.dispatch.workers.refusal_board import RefusalBoard


class RowShare:
    """The rows of worker `worker` of `num_workers`: those at `worker`, `worker + num_workers` and so on."""

    def __init__(self, worker: int, num_workers: int, board: RefusalBoard | None = None) -> None:
        """`board`: where workers say which of their rows lack an expert; ValueError for a worker out of range."""
        if not 0 <= worker < num_workers:
            raise ValueError(f"worker {worker} of {num_workers}, expected 0 to {num_workers - 1}")
        self.worker, self.num_workers, self._board = worker, num_workers, board
        self._others_T = np.zeros(0, np.bool_)

    @property
    def speaks(self) -> bool:
        """Whether this worker answers for the router: its output reaches the scheduler, and it records decisions."""
        return self.worker == 0

    def of(self, topk_ids_TK: np.ndarray) -> np.ndarray:
        """A copy of a step's decisions (int32) with -1, no expert, in the rows of other workers."""
        num_tokens = len(topk_ids_TK)
        if num_tokens > len(self._others_T):
            self._others_T = np.arange(2 * num_tokens) % self.num_workers != self.worker
        return np.where(self._others_T[:num_tokens, None], np.int32(-1), topk_ids_TK)

    def end_step(self, step: int, refused_T: np.ndarray | None) -> None:
        """The last layer of step `step` is done here; `refused_T` (bool) are this worker's rows without an expert."""
        if self._board is not None and not self.speaks:
            self._board.post(step, refused_T)

    def refused_by_any(self, step: int, refused_T: np.ndarray | None) -> np.ndarray | None:
        """Which rows of step `step` any worker refused: bool [T], or None for none. Only the worker that speaks knows.

        TimeoutError names the worker that did not finish the step.
        """
        if self._board is None:
            return refused_T
        return self._board.union(step, refused_T) if self.speaks else None
