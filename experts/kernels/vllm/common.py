"""What the kernels from vLLM share: conditions, and ragged pairs as rows of their own. Legend as in base.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from experts.kernels.base import KernelShape
from experts.model.spec import ActivationSpec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SWIGLUOAI = (1.702, 7.0)  # alpha and limit of gpt-oss, fixed inside vLLM's kernels


def swigluoai_misfit(activation: ActivationSpec) -> str | None:
    """Why vLLM cannot compute this swigluoai; None if it can, or for another activation."""
    constants = (activation.alpha, activation.limit)
    if activation.kind == "swigluoai" and constants != SWIGLUOAI:
        return f"alpha and limit of swigluoai are fixed at {SWIGLUOAI}, not {constants}"
    return None


def one_row_per_pair(
    shape: KernelShape,
    rows_MD: torch.Tensor,
    row_offsets_M1: torch.Tensor,
    slots_N: torch.Tensor,
    weights_N: torch.Tensor,
    out_MD: torch.Tensor,
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """`ExpertKernel.forward` by a function of (rows [N, D], slots [N, 1], ones [N, 1]), for kernels with a fixed top-k.

    Each pair becomes a row of its own with top-k 1; the weighted sum over a row's pairs follows in float32.
    """
    M, N = rows_MD.shape[0], slots_N.shape[0]
    if N == 0:
        out_MD.zero_()
        return
    device = rows_MD.device
    row_N = torch.repeat_interleave(torch.arange(M), row_offsets_M1.diff().long()).to(device, non_blocking=True)
    slots_N1 = slots_N[:, None].to(device, non_blocking=True)
    weights_N1 = weights_N[:, None].to(device, non_blocking=True)
    x_ND = rows_MD[row_N]
    if shape.weight_on_input:
        x_ND = (x_ND.float() * weights_N1).to(shape.dtype)
    y_ND = experts(x_ND, slots_N1, torch.ones_like(weights_N1)).float()
    if not shape.weight_on_input:
        y_ND *= weights_N1
    acc_MD = torch.zeros(rows_MD.shape, dtype=torch.float32, device=device)
    out_MD.copy_(acc_MD.index_add_(0, row_N, y_ND))


def vllm_misfit(shape: KernelShape) -> str | None:
    """Why vLLM's GPU kernels cannot run on the device of `shape`, None if they may. Does not import vllm."""
    if shape.device_type != "cuda":
        return f"it runs on CUDA, not on {shape.device}"
    if shape.dtype == torch.float32:
        return "its matmuls round float32 to TF32, and float32 is served for exactness"
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None
