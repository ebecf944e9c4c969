"""Our own CPU kernel (native_mlp.cpp): gather, both matrices, activation and weighted sum in one call.

It uses the bf16 dot product of AVX512_BF16 if the processor has it. Legend as in base.py.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref

import numpy as np
import torch

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.native.library import load_library
from experts.model.spec import ExpertWeights
from experts.native.build import NativeBuildError

ACTIVATION_IDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "swigluoai": 3}
FORMAT_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BAD_PAIRS = 1


class NativeKernel(ExpertKernel):
    """Packed weights, in huge pages if the system provides them; float32, bfloat16 and float16."""

    name = "native"

    def __init__(self, shape: KernelShape, num_places: int | None = None, places_address: int | None = None) -> None:
        """`num_places` of memory in each layer, by default one for each slot; else see placed.py."""
        super().__init__(shape)
        self._library = load_library()
        self._format = FORMAT_IDS[shape.dtype]
        self._slot_bytes = self._library.expert_mlp_slot_bytes(self._format, shape.hidden_size, shape.intermediate_size)
        size = shape.num_layers * (num_places or shape.num_slots) * self._slot_bytes
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._packed = np.frombuffer(memory, dtype=np.uint8)
        activation = shape.activation
        handle = self._library.expert_mlp_create(
            self._format,
            shape.num_layers,
            shape.num_slots,
            shape.hidden_size,
            shape.intermediate_size,
            ACTIVATION_IDS[activation.kind],
            activation.alpha,
            math.inf if activation.limit is None else activation.limit,
            int(shape.weight_on_input),
            self._packed.ctypes.data,
            self._loaded_LS.ctypes.data,
            places_address,
        )
        if not handle:
            raise MemoryError("not enough memory for the native kernel")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self._library.expert_mlp_destroy, self._handle)

    @classmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """All activations and sizes on the CPU, in float32, bfloat16 and float16; needs a C++ compiler."""
        if shape.device_type != "cpu":
            return f"it runs on the CPU, not on {shape.device}"
        try:
            load_library()
        except NativeBuildError as error:
            return str(error)
        return None

    def _pack(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        shape = self.shape
        w13 = weights.w13_2ID.to("cpu", shape.dtype).contiguous()
        w2 = weights.w2_DI.to("cpu", shape.dtype).contiguous()
        # round biases to the model's dtype like all other weights; they are added in float32
        b13 = None if weights.b13_2I is None else weights.b13_2I.to("cpu", shape.dtype).float().contiguous()
        b2 = None if weights.b2_D is None else weights.b2_D.to("cpu", shape.dtype).float().contiguous()
        self._library.expert_mlp_pack(
            self._format,
            shape.hidden_size,
            shape.intermediate_size,
            w13.data_ptr(),
            None if b13 is None else b13.data_ptr(),
            w2.data_ptr(),
            None if b2 is None else b2.data_ptr(),
            self._packed.ctypes.data + (layer * shape.num_slots + slot) * self._slot_bytes,
        )

    def compiled_forward(self) -> tuple[int, int] | None:
        function = ctypes.cast(self._library.expert_mlp_forward_rows, ctypes.c_void_p)
        return int(function.value or 0), int(self._handle.value or 0)

    def _packing(self) -> str:
        return f"native, {self._library.expert_mlp_lanes()} lanes"

    def _weight_tensors(self) -> list[torch.Tensor]:
        return [torch.from_numpy(self._packed)]

    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """See `ExpertKernel.forward`. Uses as many threads as torch; the result does not depend on their number."""
        self.forward_part(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD, True, True)

    def forward_part(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
        first: bool,
        last: bool,
        ranks_N: torch.Tensor | None = None,
        num_pairs: int = 0,
    ) -> None:
        """One of several calls that are one `forward`, for the same rows. The last one writes what they sum up to.

        Their slots rise from call to call, and the sums stay in float32 between them. Or `ranks_N` (int32, on the CPU)
        says of each pair which one it is of the `num_pairs` of all calls in the order of slots, then rows: their
        products are kept until the last call adds them up in this order. So the bits are those of one call.
        """
        self._check_shapes(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        status = self._library.expert_mlp_forward(
            self._handle,
            layer,
            rows_MD.shape[0],
            slots_N.shape[0],
            rows_MD.data_ptr(),
            rows_MD.stride(0),
            row_offsets_M1.data_ptr(),
            slots_N.data_ptr(),
            weights_N.data_ptr(),
            out_MD.data_ptr(),
            out_MD.stride(0),
            torch.get_num_threads(),
            first,
            last,
            None if ranks_N is None else ranks_N.data_ptr(),
            num_pairs,
        )
        if status == BAD_PAIRS:
            self._check_call(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
            raise AssertionError("the kernel refused valid pairs")
        if status:
            raise MemoryError(f"not enough memory for {rows_MD.shape[0]} rows and {slots_N.shape[0]} pairs")
