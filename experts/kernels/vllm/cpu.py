"""Kernel made of vLLM's CPU fused MoE (`torch.ops._C.cpu_fused_moe`, vector instructions); needs vllm.

The operation needs the same number of experts for every row. If all rows have equally many pairs, it gathers and sums
itself; ragged pairs become rows of their own with top-k 1. Legend as in base.py; K pairs of a row.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from pathlib import Path

import torch

from experts.kernels.base import KernelShape
from experts.kernels.stacked import StackedKernel
from experts.kernels.vllm.common import swigluoai_misfit
from experts.model.spec import ExpertWeights

ISA = "vec"
ALIGNMENT = 32  # output columns of both matrices


def _library_name() -> str:
    """The extension module that vLLM's CPU platform loads on this processor."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported():
        return "_C.abi3.so"
    return "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"


@functools.cache
def _library() -> Path | None:
    """Where that module would be, None without vllm."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / _library_name()


@functools.cache
def _missing_ops() -> str | None:
    """Why vLLM's operations are not available, or None. Loads only the library: importing vllm takes seconds."""
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        library = _library()
        if library is None:
            return "vllm is not installed"
        if not library.exists():
            return f"this vllm is not a CPU build: it has no {library.name}"
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            return f"vllm's {library.name} cannot be loaded: {error}"
    for op in ("cpu_fused_moe", "prepack_moe_weight"):
        if not hasattr(torch.ops._C, op):
            return f"this build of vllm has no {op}"
    return None


class VllmCpuKernel(StackedKernel):
    """The kernel that plain vLLM runs for the same experts."""

    name = "vllm_cpu"

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """The CPU, sizes in multiples of 32, and for swigluoai only gpt-oss's constants."""
        if shape.device_type != "cpu":
            return f"it runs on the CPU, not on {shape.device}"
        for field in ("hidden_size", "intermediate_size"):
            if getattr(shape, field) % ALIGNMENT:
                return f"{field} {getattr(shape, field)} is not a multiple of {ALIGNMENT}"
        return swigluoai_misfit(shape.activation) or _missing_ops()

    def _pack(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        shape, stacked = self.shape, self._weights
        w13_2ID = weights.w13_2ID.to("cpu", shape.dtype)
        b13_2I = None if weights.b13_2I is None else weights.b13_2I.to("cpu", shape.dtype)
        if shape.activation.kind == "swigluoai":  # vLLM's expects gate and up rows to alternate
            w13_2ID = w13_2ID.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            b13_2I = None if b13_2I is None else b13_2I.view(2, -1).t().flatten()
        w2_DI = weights.w2_DI.to("cpu", shape.dtype)
        for source, target_LS in ((w13_2ID, stacked.w13_LS2ID), (w2_DI, stacked.w2_LSDI)):
            torch.ops._C.prepack_moe_weight(source[None].contiguous(), target_LS[layer, slot : slot + 1], ISA)
        if stacked.b13_LS2I is not None and stacked.b2_LSD is not None:
            assert b13_2I is not None
            assert weights.b2_D is not None
            stacked.b13_LS2I[layer, slot].copy_(b13_2I)
            stacked.b2_LSD[layer, slot].copy_(weights.b2_D)

    def _packing(self) -> str:
        library = _library()
        assert library is not None
        # The size tells builds apart, and needs no import of vllm.
        return f"vllm's {ISA}, {library.name} of {library.stat().st_size} bytes"

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`. Ragged calls round each pair's product to the rows' dtype before the sum."""
        self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        M, N = rows_MD.shape[0], slots_N.shape[0]
        if N == 0:
            out_MD.zero_()
            return
        per_row_M = row_offsets_M1.diff()
        K = N // M
        on_input = self.shape.weight_on_input
        if bool((per_row_M == K).all()) and not (on_input and K > 1):
            x_MD = (rows_MD.float() * weights_N[:, None]).to(self.shape.dtype) if on_input else rows_MD.contiguous()
            y_MD = out_MD if out_MD.is_contiguous() else torch.empty_like(x_MD)
            self._run(layer, x_MD, slots_N.view(M, K), weights_N.view(M, K), y_MD)
            if y_MD is not out_MD:
                out_MD.copy_(y_MD)
            return
        row_N = torch.repeat_interleave(torch.arange(M), per_row_M.long())
        x_ND = rows_MD[row_N]
        if on_input:
            x_ND = (x_ND.float() * weights_N[:, None]).to(self.shape.dtype)
        y_ND = torch.empty_like(x_ND)
        self._run(layer, x_ND, slots_N[:, None], weights_N[:, None], y_ND)
        acc_MD = torch.zeros(rows_MD.shape, dtype=torch.float32)
        out_MD.copy_(acc_MD.index_add_(0, row_N, y_ND.float()))

    def _run(
        self, layer: int, x_MD: torch.Tensor, slots_MK: torch.Tensor, weights_MK: torch.Tensor, y_MD: torch.Tensor
    ) -> None:
        stacked = self._weights
        torch.ops._C.cpu_fused_moe(
            y_MD,
            x_MD,
            stacked.w13_LS2ID[layer],
            stacked.w2_LSDI[layer],
            None if stacked.b13_LS2I is None else stacked.b13_LS2I[layer],
            None if stacked.b2_LSD is None else stacked.b2_LSD[layer],
            # not the operation's skip_weighted: it overwrites the caller's weights with ones
            torch.ones_like(weights_MK) if self.shape.weight_on_input else weights_MK,
            slots_MK,
            False,
            self.shape.activation.kind,
            ISA,
        )
