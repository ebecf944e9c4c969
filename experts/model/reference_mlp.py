"""One expert's MLP in plain torch: the definition that kernels must match."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.model.spec import ActivationSpec, ExpertWeights


def gated_activation(gate: torch.Tensor, up: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """The gated activation of `spec`; `ActivationSpec` has the formulas. ValueError for an unknown kind."""
    if spec.kind == "silu":
        return F.silu(gate) * up
    if spec.kind == "gelu":
        return F.gelu(gate) * up
    if spec.kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if spec.kind == "swigluoai":
        if spec.limit is not None:
            gate = gate.clamp(max=spec.limit)
            up = up.clamp(min=-spec.limit, max=spec.limit)
        return gate * torch.sigmoid(spec.alpha * gate) * (up + 1)
    raise ValueError(f"unknown activation {spec.kind!r}, expected silu, gelu, gelu_tanh or swigluoai")


def expert_mlp(rows_MD: torch.Tensor, weights: ExpertWeights, activation: ActivationSpec) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) for rows [M, D]; returns [M, D] in the rows' dtype. M may be 0."""
    w13, w2, b13, b2 = (
        None if t is None else t.to(rows_MD.device)
        for t in (weights.w13_2ID, weights.w2_DI, weights.b13_2I, weights.b2_D)
    )
    assert w13 is not None
    assert w2 is not None
    gate, up = F.linear(rows_MD, w13, b13).chunk(2, dim=-1)
    return F.linear(gated_activation(gate, up, activation), w2, b2)
