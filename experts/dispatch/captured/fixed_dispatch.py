"""Dispatch of fixed capacity: every rank gets a message of the same size each time, and the host never waits.

Legend: T tokens, K top-k, R ranks, L MoE layers, E experts, D hidden size.

    pack()      plan and CSR on the device, rows into the messages     2 launches, 3 where experts have replicas
    (exchange)  message r to rank r, replies back: sizes never change
    combine()   sum of the replies                                     1 launch

All of it uses the same memory each time and decides nothing on the host, so a CUDA graph can capture it for a decode
batch of T tokens. The price is bytes: each rank gets room for T rows, full or not. No rank can get more than T rows, so
nothing overflows. A message is

    int32: rows, pairs, 0, 0 | row_offsets [T + 1] | experts [T K] | weights [T K] (float32) | rows [T, D]

with sections on 64-byte boundaries; a reply is rows [T, D]. The host looks at `unserved`, the pairs that no live rank
could serve, after a step. A captured exchange with a dead peer never ends by itself: abort its communicator, then
repeat the step with the dispatcher, which can do without a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from experts.dispatch.captured import triton_plan
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows import triton_programs
from experts.dispatch.rows.torch_mover import address_table
from experts.dispatch.rows.triton_mover import BLOCK_D, blocks_of
from experts.protocol.wire import aligned

COUNT_WORDS = 4
BLOCK_T = 64


def power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value` and at least 1."""
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class MessageLayout:
    """Byte offsets of the sections of a message."""

    num_tokens: int
    top_k: int
    row_bytes: int

    @property
    def offsets_at(self) -> int:
        """Row offsets, int32 [T + 1]; the counts come before them."""
        return int(aligned(4 * COUNT_WORDS))

    @property
    def experts_at(self) -> int:
        """Logical experts of the pairs, int32."""
        return self.offsets_at + int(aligned(4 * (self.num_tokens + 1)))

    @property
    def weights_at(self) -> int:
        """Weights of the pairs, float32."""
        return self.experts_at + int(aligned(4 * self.num_tokens * self.top_k))

    @property
    def rows_at(self) -> int:
        """Rows [T, D]."""
        return self.weights_at + int(aligned(4 * self.num_tokens * self.top_k))

    @property
    def nbytes(self) -> int:
        """Length of a whole message."""
        return int(aligned(self.rows_at + self.reply_bytes))

    @property
    def reply_bytes(self) -> int:
        """Length of a reply."""
        return self.num_tokens * self.row_bytes


class FixedDispatch:
    """One router's dispatch of steps with exactly `num_tokens` tokens."""

    def __init__(
        self, shape: LayerShape, num_tokens: int, num_ranks: int, num_nodes: int, replicas: bool, device: torch.device
    ) -> None:
        """`replicas`: whether placements may hold an expert twice; choosing one costs a launch of one program."""
        self.shape = shape
        self.layout = MessageLayout(num_tokens, shape.top_k, shape.row_bytes)
        self.num_ranks = num_ranks
        self.num_nodes = num_nodes
        self.replicas = replicas
        pairs = (num_tokens, shape.top_k)
        ints = {"dtype": torch.int32, "device": device}
        self.send_RB = torch.zeros(num_ranks, self.layout.nbytes, dtype=torch.uint8, device=device)
        """Message r goes to rank r."""
        self.recv_RTD = torch.zeros(num_ranks, num_tokens, shape.hidden_size, dtype=shape.dtype, device=device)
        """Reply r comes from rank r."""
        self.unserved = torch.zeros(1, **ints)
        """int32; every pack adds to it, the reader resets it to 0."""
        self._rank_TK, self._row_TK = torch.full(pairs, -1, **ints), torch.full(pairs, -1, **ints)
        self._slots_LER = torch.full((shape.num_layers, shape.num_experts, num_ranks), -1, **ints)
        self._home_LE = torch.full((shape.num_layers, shape.num_experts), -1, **ints)
        self._work_R = torch.ones(num_ranks, dtype=torch.int64, device=device)
        self._load_LR = torch.zeros(shape.num_layers, num_ranks, dtype=torch.int64, device=device)
        node_of_rank_R = np.arange(num_ranks) * num_nodes // num_ranks
        self._node_of_rank_R = torch.from_numpy(node_of_rank_R.astype(np.int32)).to(device)
        self._send_address_R = (
            address_table({0: self.send_RB}) + self.layout.rows_at + torch.arange(num_ranks) * self.layout.nbytes
        ).to(device)
        self._recv_address_R = (
            address_table({0: self.recv_RTD}) + torch.arange(num_ranks) * self.layout.reply_bytes
        ).to(device)
        if self.layout.reply_bytes % 16 and num_ranks > 1:
            raise ValueError(
                f"{num_tokens} rows of {shape.row_bytes} bytes are no multiple of 16 bytes, which replies have to be"
            )

    def set_placement(self, slots_LER: np.ndarray, work_R: np.ndarray) -> None:
        """Use another epoch from the next step on, also in graphs that were captured before.

        `slots_LER`: int32, -1 where a rank has no slot for an expert or is lost; `work_R`: int64, what a pair counts on
        each rank (`Placement.work_R`). ValueError for another shape, or for replicas if this dispatch was made without:
        graphs in use would not see them.
        """
        if slots_LER.shape != tuple(self._slots_LER.shape):
            raise ValueError(f"slots are {list(slots_LER.shape)}, expected {list(self._slots_LER.shape)}")
        if work_R.shape != (self.num_ranks,):
            raise ValueError(f"work is {list(work_R.shape)}, expected [{self.num_ranks}]")
        held_LER = slots_LER >= 0
        if not self.replicas and (held_LER.sum(2) > 1).any():
            raise ValueError("this placement has replicas, the dispatch was made for placements without")
        home_LE = np.where(held_LER.any(2), held_LER.argmax(2), -1).astype(np.int32)
        self._slots_LER.copy_(torch.from_numpy(np.ascontiguousarray(slots_LER, np.int32)))
        self._home_LE.copy_(torch.from_numpy(home_LE))
        self._work_R.copy_(torch.from_numpy(np.ascontiguousarray(work_R, np.int64)))

    def pack(self, layer: int, x_TD: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor) -> None:
        """Write every rank's message. Ids are int32, weights float32, all contiguous and on the device."""
        shape, layout = self.shape, self.layout
        shape.check_call(layer, x_TD, topk_weights_TK, topk_ids_TK)
        if x_TD.shape[0] != layout.num_tokens:
            raise ValueError(f"{x_TD.shape[0]} tokens, this dispatch was made for {layout.num_tokens}")
        if topk_ids_TK.dtype != torch.int32 or topk_weights_TK.dtype != torch.float32:
            raise ValueError(
                f"ids are {topk_ids_TK.dtype}, weights {topk_weights_TK.dtype}, expected int32 and float32"
            )
        if not (topk_ids_TK.is_contiguous() and topk_weights_TK.is_contiguous() and x_TD.stride(1) == 1):
            raise ValueError("ids, weights and rows must be contiguous")
        T, K, D = layout.num_tokens, shape.top_k, shape.hidden_size
        if self.replicas:
            triton_plan.choose_ranks[(1,)](
                topk_ids_TK, self._slots_LER[layer], self._node_of_rank_R, self._work_R, self._load_LR[layer],
                self._rank_TK, T, shape.num_experts, self.num_ranks, NUM_NODES=self.num_nodes, K=K,
                BLOCK_K=power_of_2(K), BLOCK_R=power_of_2(self.num_ranks), BLOCK_N=power_of_2(self.num_nodes),
                num_warps=1,  # the tiles are small, and reductions within a warp need no barrier
            )  # fmt: skip
        triton_plan.place_pairs[(self.num_ranks,)](
            topk_ids_TK, topk_weights_TK, self._home_LE[layer], self._rank_TK, self._row_TK,
            self.send_RB.view(torch.int32), self.unserved,
            T, shape.num_experts, layout.nbytes // 4, layout.offsets_at // 4, layout.experts_at // 4,
            layout.weights_at // 4, HAS_RANKS=self.replicas, K=K, BLOCK_T=BLOCK_T, BLOCK_K=power_of_2(K),
        )  # fmt: skip
        if T:
            triton_programs.pack_rows[(T * K, blocks_of(D))](
                x_TD, self._rank_TK, self._row_TK, self._send_address_R, x_TD.stride(0), D, K=K, BLOCK_D=BLOCK_D
            )

    def combine(self, y_TD: torch.Tensor) -> None:
        """y = sum of the partial rows in `recv_RTD`, for the latest `pack`."""
        T, D = y_TD.shape
        if tuple(self.recv_RTD.shape[1:]) != (T, D) or y_TD.dtype != self.shape.dtype or y_TD.stride(1) != 1:
            raise ValueError(
                f"y is {y_TD.dtype} {list(y_TD.shape)}, expected contiguous {self.shape.dtype} "
                f"{list(self.recv_RTD.shape[1:])}"
            )
        if T:
            triton_programs.combine_rows[(T, blocks_of(D))](
                self._rank_TK, self._row_TK, self._recv_address_R, y_TD, y_TD, y_TD.stride(0), 0, D,
                ADD=False, KEEP=False, K=self.shape.top_k, BLOCK_D=BLOCK_D,
            )  # fmt: skip


@dataclass(frozen=True)
class FixedMessage:
    """The content of a message, as the tensors that `ExpertKernel.forward` takes."""

    rows_MD: torch.Tensor
    row_offsets_M1: torch.Tensor
    experts_N: torch.Tensor
    weights_N: torch.Tensor


def read_message(message_B: torch.Tensor, layout: MessageLayout, dtype: torch.dtype) -> FixedMessage:
    """Parse one message (uint8). Everything except the rows goes to the CPU: the shard's one wait for the device.

    ValueError for counts that no router writes.
    """
    host = message_B[: layout.rows_at].cpu()
    rows, pairs = host[: 4 * COUNT_WORDS].view(torch.int32)[:2].tolist()
    if not (0 <= rows <= layout.num_tokens and rows <= pairs <= layout.num_tokens * layout.top_k):
        raise ValueError(
            f"{rows} rows and {pairs} pairs, expected at most {layout.num_tokens} rows with {layout.top_k} pairs each"
        )

    def section(start: int, count: int) -> torch.Tensor:
        return host[start : start + 4 * count].view(torch.int32)

    data = message_B[layout.rows_at : layout.rows_at + rows * layout.row_bytes]
    return FixedMessage(
        rows_MD=data.view(dtype).view(rows, layout.row_bytes // dtype.itemsize),
        row_offsets_M1=section(layout.offsets_at, rows + 1),
        experts_N=section(layout.experts_at, pairs),
        weights_N=section(layout.weights_at, pairs).view(torch.float32),
    )
