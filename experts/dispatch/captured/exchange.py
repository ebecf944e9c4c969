"""The exchange between `FixedDispatch.pack` and `combine`, over the groups of pairs.

    router (can be captured)             shard
    send message r to rank r     --->    receive, read_message (waits for the device), compute
    receive reply r              <---    send rows [T, D]

Over NCCL each pair's messages run on a stream of its own; the caller's stream waits for all of them, the host for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from experts.dispatch.captured.fixed_dispatch import FixedDispatch, FixedMessage, MessageLayout, read_message
from experts.transports.torch_groups import PairGroup


def exchange(dispatch: FixedDispatch, groups: Sequence[PairGroup], deadline_s: float | None = None) -> None:
    """Send every message, receive every reply. `groups[r]` joins rank r.

    `deadline_s` (time.monotonic()) bounds groups in host memory only; what is on a GPU's stream ends with its peer or
    with `abort`. TimeoutError, ConnectionError; ValueError if the number of groups is not that of ranks.
    """
    if len(groups) != dispatch.num_ranks:
        raise ValueError(f"{len(groups)} pairs for {dispatch.num_ranks} ranks")
    works = [group.send(dispatch.send_RB[rank]) for rank, group in enumerate(groups)]
    # Over gloo each direction of a pair is a queue of its own, over NCCL both share one: receive after all sends.
    works += [group.recv(dispatch.recv_RTD[rank].view(torch.uint8).flatten()) for rank, group in enumerate(groups)]
    for work, group in zip(works, [*groups, *groups], strict=True):
        group.join(work, deadline_s)


class FixedPeer:
    """The shard's end of one pair: its buffers, and one answer at a time."""

    def __init__(self, group: PairGroup, layout: MessageLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._group = group
        self._layout = layout
        self._dtype = dtype
        self._message_B = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        self._reply_B = torch.zeros(layout.reply_bytes, dtype=torch.uint8, device=device)

    def serve(self, compute: Callable[[FixedMessage, torch.Tensor], None], deadline_s: float) -> None:
        """Answer one message: `compute` gets it and the rows [M, D] to fill.

        `deadline_s` (time.monotonic()) bounds each wait. TimeoutError, ConnectionError, ValueError.
        """
        self._group.wait(self._group.recv(self._message_B), deadline_s)
        message = read_message(self._message_B, self._layout, self._dtype)
        rows, hidden_size = message.rows_MD.shape
        compute(message, self._reply_B.view(self._dtype).view(-1, hidden_size)[:rows])
        self._group.wait(self._group.send(self._reply_B), deadline_s)
