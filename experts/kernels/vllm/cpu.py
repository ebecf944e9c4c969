"""Kernel made of vLLM's CPU fused MoE (`torch.ops._C.cpu_fused_moe`, vector instructions), where vllm is installed.

The operation wants the same number of experts for every row. Ragged pairs go in as rows of their own with top-k 1;
where all rows have equally many pairs, it gathers and sums by itself. Legend as in base.py; K pairs of a row.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from pathlib import Path

import torch

from experts.kernels.base import ExpertKernel, KernelShape
from experts.model.spec import ExpertWeights

ISA = "vec"
ALIGNMENT = 32  # output columns of both matrices
SWIGLUOAI = (1.702, 7.0)  # alpha and limit, fixed inside vLLM's kernel


def _library_name() -> str:
    """The extension module that vLLM's CPU platform would load on this processor."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported():
        return "_C.abi3.so"
    return "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"


@functools.cache
def _missing_ops() -> str | None:
    """Why vLLM's operations cannot be had, or None. Loads the library alone: importing vllm would take seconds."""
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            return "vllm is not installed"
        library = Path(spec.submodule_search_locations[0]) / _library_name()
        if not library.exists():
            return f"this vllm is no CPU build: it has no {library.name}"
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            return f"vllm's {library.name} cannot be loaded: {error}"
    for op in ("cpu_fused_moe", "prepack_moe_weight"):
        if not hasattr(torch.ops._C, op):
            return f"this build of vllm has no {op}"
    return None


class VllmCpuKernel(ExpertKernel):
    """vLLM's own kernel: what plain vLLM would run for the same experts."""

    name = "vllm_cpu"

    def __init__(self, shape: KernelShape) -> None:
        super().__init__(shape)
        L, S, D, I = shape.num_layers, shape.num_slots, shape.hidden_size, shape.intermediate_size
        self._w13_LS2ID = torch.zeros(L, S, 2 * I, D, dtype=shape.dtype)
        self._w2_LSDI = torch.zeros(L, S, D, I, dtype=shape.dtype)
        self._b13_LS2I = torch.zeros(L, S, 2 * I, dtype=shape.dtype) if shape.has_bias else None
        self._b2_LSD = torch.zeros(L, S, D, dtype=shape.dtype) if shape.has_bias else None

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """Sizes that are multiples of 32, on the CPU, with gpt-oss's own constants if it is its activation."""
        if shape.device_type != "cpu":
            return f"it runs on the CPU, not on {shape.device}"
        for field in ("hidden_size", "intermediate_size"):
            if getattr(shape, field) % ALIGNMENT:
                return f"{field} {getattr(shape, field)} is no multiple of {ALIGNMENT}"
        activation = shape.activation
        if activation.kind == "swigluoai" and (activation.alpha, activation.limit) != SWIGLUOAI:
            return f"swigluoai has alpha {SWIGLUOAI[0]} and limit {SWIGLUOAI[1]} fixed in it"
        return _missing_ops()

    def _pack(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        shape = self.shape
        w13_2ID = weights.w13_2ID.to("cpu", shape.dtype)
        b13_2I = None if weights.b13_2I is None else weights.b13_2I.to("cpu", shape.dtype)
        if shape.activation.kind == "swigluoai":  # vLLM's takes gate and up rows in turns
            w13_2ID = w13_2ID.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            b13_2I = None if b13_2I is None else b13_2I.view(2, -1).t().flatten()
        for source, target_LS in ((w13_2ID, self._w13_LS2ID), (weights.w2_DI.to("cpu", shape.dtype), self._w2_LSDI)):
            torch.ops._C.prepack_moe_weight(source[None].contiguous(), target_LS[layer, slot : slot + 1], ISA)
        if self._b13_LS2I is not None and self._b2_LSD is not None:
            assert b13_2I is not None
            assert weights.b2_D is not None
            self._b13_LS2I[layer, slot].copy_(b13_2I)
            self._b2_LSD[layer, slot].copy_(weights.b2_D)

    def _weight_tensors(self) -> list[torch.Tensor]:
        return [t for t in (self._w13_LS2ID, self._w2_LSDI, self._b13_LS2I, self._b2_LSD) if t is not None]

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
        torch.ops._C.cpu_fused_moe(
            y_MD,
            x_MD,
            self._w13_LS2ID[layer],
            self._w2_LSDI[layer],
            None if self._b13_LS2I is None else self._b13_LS2I[layer],
            None if self._b2_LSD is None else self._b2_LSD[layer],
            # not the operation's own skip_weighted: that overwrites the caller's weights with ones
            torch.ones_like(weights_MK) if self.shape.weight_on_input else weights_MK,
            slots_MK,
            False,
            self.shape.activation.kind,
            ISA,
        )
