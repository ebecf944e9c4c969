"""Pack and combine as tensor operations: for rows that live on a GPU, and for dtypes that `plan.combine` does not know.

Legend: T tokens, K top-k, D hidden size, M rows of one rank's message. The device's form of what
`experts.dispatch.rows.host_programs` does in host memory; the plan itself is the same.
"""

from __future__ import annotations

import numpy as np
import torch


def tokens_of_rank(rank: int, rank_TK: np.ndarray, row_TK: np.ndarray, device: torch.device) -> torch.Tensor:
    """The token of each row of a rank's message: int64 [M] on `device`. Arguments as `plan_and_pack` wrote them."""
    return torch.from_numpy(np.nonzero((rank_TK == rank) & (row_TK >= 0))[0]).to(device, non_blocking=True)


def rows_in(data: torch.Tensor, num_rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `num_rows` rows [M, D] in the bytes `data` (uint8); a view."""
    return data[: num_rows * hidden_size * dtype.itemsize].view(dtype).view(num_rows, hidden_size)


def gather_rows(x_TD: torch.Tensor, tokens_M: torch.Tensor, out_MD: torch.Tensor) -> None:
    """out = x[tokens]."""
    torch.index_select(x_TD, 0, tokens_M, out=out_MD)


def add_rows(sum_TD: torch.Tensor, tokens_M: torch.Tensor, rows_MD: torch.Tensor) -> None:
    """sum[tokens] += rows, in fp32."""
    sum_TD.index_add_(0, tokens_M, rows_MD.float())
