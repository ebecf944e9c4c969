"""Where a router's workers leave word of the rows that lack an expert, for the one whose output reaches the scheduler.

Legend: T tokens of a step, W workers.

Shared memory of W lines. A worker writes its refused rows and then the number of the step. Worker 0 waits for that
number: on CPUs it is always there, since the all-reduce of the last layer waits for every worker; on GPUs worker 0's
process may be ahead of its stream. A worker may be one step ahead of worker 0, never two, as it takes part in every
all-reduce. So a line has room for two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experts.protocol.errors import UnsupportedModelError
from experts.protocol.membership import host_id
from experts.transports import atomics
from experts.transports.shared_region import FdMailbox, SharedRegion

HAND_OVER_S = 60.0
_HEAD_BYTES = 64  # the step's number, and whether worker 0 sleeps until it comes
_ENTRY_HEAD_BYTES = 8  # rows of the step that are told, 0 if none is refused
_HALF = 1 << 31
_SPIN_NS = 20_000


class RefusalBoard:
    """One worker's view of the board."""

    def __init__(self, region: SharedRegion, worker: int, num_workers: int, max_rows: int, timeout_s: float) -> None:
        """`max_rows` bounds a step; `timeout_s` how long worker 0 waits for another to finish one."""
        self._region = region
        self._worker, self._num_workers = worker, num_workers
        self._max_rows, self._timeout_s = max_rows, timeout_s
        self._stride = _stride(max_rows)
        self._entry_bytes = (self._stride - _HEAD_BYTES) // 2
        atomics.warm_up()

    @staticmethod
    def size(num_workers: int, max_rows: int) -> int:
        """Bytes of the shared memory."""
        return num_workers * _stride(max_rows)

    def post(self, step: int, refused_T: np.ndarray | None) -> None:
        """Say that this worker finished a step, and which rows of it lack an expert (bool [T], None for none).

        ValueError for more rows than the board has room for.
        """
        num_rows, flags = self._entry(self._worker, step)
        num_rows[0] = 0
        if refused_T is not None:
            if len(refused_T) > self._max_rows:
                raise ValueError(f"a step of {len(refused_T)} rows, expected at most {self._max_rows}")
            flags[: len(refused_T)] = refused_T
            num_rows[0] = len(refused_T)
        address = self._address(self._worker)
        atomics.publish(address, step % (2 * _HALF), address + 4)

    def union(self, step: int, refused_T: np.ndarray | None) -> np.ndarray | None:
        """Rows of a step that this worker or any other refused: bool [T], None for none. TimeoutError names a worker.

        The other workers are waited for until they have posted that step.
        """
        deadline_s = time.monotonic() + self._timeout_s
        for worker in range(self._num_workers):
            if worker == self._worker:
                continue
            self._await(worker, step, deadline_s)
            num_rows, flags = self._entry(worker, step)
            if num_rows[0]:
                theirs_T = flags[: int(num_rows[0])].view(np.bool_).copy()
                refused_T = theirs_T if refused_T is None else refused_T | theirs_T
        return refused_T

    def _await(self, worker: int, step: int, deadline_s: float) -> None:
        address = self._address(worker)
        seen = atomics.load_word(address)
        while (seen - step) % (2 * _HALF) >= _HALF:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(
                    f"worker {worker} of this router did not finish step {step} within {self._timeout_s:g} s after "
                    f"worker {self._worker} had; it was last heard of at step {seen}"
                )
            seen = atomics.wait_while_equal(address, address + 4, seen, _SPIN_NS, int(left_s * 1e9))

    def _address(self, worker: int) -> int:
        return self._region.address + worker * self._stride

    def _entry(self, worker: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of rows, int64 [1]; a byte for each row) of a worker's step; views."""
        start = worker * self._stride + _HEAD_BYTES + step % 2 * self._entry_bytes
        entry = self._region.bytes[start : start + self._entry_bytes]
        return entry[:_ENTRY_HEAD_BYTES].view(np.int64), entry[_ENTRY_HEAD_BYTES:]


def make_board(
    worker: int, num_workers: int, max_rows: int, timeout_s: float, gather: Callable[[Any], list[Any]]
) -> RefusalBoard:
    """The board of a router's workers; each of them calls this at the same time.

    `gather` gives what every worker handed to it, by worker. UnsupportedModelError if they are not on one host.
    """
    mailbox = FdMailbox() if worker else None
    try:
        told = gather((host_id(), "" if mailbox is None else mailbox.name))
        hosts = [host for host, _ in told]
        if len(set(hosts)) > 1:
            raise UnsupportedModelError(
                f"the workers of this engine are on {len(set(hosts))} hosts, expected one: tensor parallelism across "
                "hosts is not supported, run more routers instead"
            )
        size = RefusalBoard.size(num_workers, max_rows)
        if mailbox is None:
            region = SharedRegion.create(size, "refusals")
            for _, name in told[1:]:
                FdMailbox.send(name, [region.descriptor], HAND_OVER_S)
        else:
            region = SharedRegion(mailbox.receive(time.monotonic() + HAND_OVER_S, 1)[0], size)
        region.drop_descriptor()
    finally:
        if mailbox is not None:
            mailbox.close()
    return RefusalBoard(region, worker, num_workers, max_rows, timeout_s)


def _stride(max_rows: int) -> int:
    """Bytes of one worker's line: its head, and two entries that begin at multiples of 8."""
    return _HEAD_BYTES + 2 * (_ENTRY_HEAD_BYTES + -(-max_rows // 8) * 8)
