"""What the kernels made of torch operations share: the activation, and pairs sorted by slot.

Legend as in base.py; P pairs sorted by slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experts.model.spec import ActivationSpec


def gated_activation(spec: ActivationSpec, gate_up_P2I: torch.Tensor) -> torch.Tensor:
    """[P, 2I], gates in the first half, to [P, I] in the same dtype. `ActivationSpec` has the formulas."""
    gate, up = gate_up_P2I.chunk(2, dim=-1)
    if spec.kind == "silu":
        return F.silu(gate) * up
    if spec.kind == "gelu":
        return F.gelu(gate) * up
    if spec.kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(min=-spec.limit, max=spec.limit)
    return gate * torch.sigmoid(spec.alpha * gate) * (up + 1)


@dataclass(frozen=True)
class SortedPairs:
    """The pairs of a call, stably sorted by slot."""

    row_P: torch.Tensor  # int64: row of each pair
    slot_P: torch.Tensor  # int64: slot of each pair
    weight_P: torch.Tensor  # float32: router weight of each pair
    ends_S: torch.Tensor  # int32: where each slot's pairs end

    def to(self, device: torch.device) -> SortedPairs:
        """The same on another device."""
        return SortedPairs(
            self.row_P.to(device, non_blocking=True),
            self.slot_P.to(device, non_blocking=True),
            self.weight_P.to(device, non_blocking=True),
            self.ends_S.to(device, non_blocking=True),
        )


def sort_pairs(
    row_offsets_M1: torch.Tensor, slots_N: torch.Tensor, weights_N: torch.Tensor, num_slots: int
) -> SortedPairs:
    """Sort a call's pairs by slot. All tensors on the CPU; P = N."""
    M = row_offsets_M1.shape[0] - 1
    row_N = torch.repeat_interleave(torch.arange(M), row_offsets_M1.diff().long())
    slot_P, order_P = torch.sort(slots_N.long(), stable=True)
    ends_S = torch.cumsum(torch.bincount(slot_P, minlength=num_slots), 0, dtype=torch.int32)
    return SortedPairs(row_N[order_P], slot_P, weights_N[order_P], ends_S)
