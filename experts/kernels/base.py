"""The interface of every expert kernel: the grouped gated MLP of one shard, over ragged (row, slot) pairs.

Legend: L MoE layers, S slots of the shard, M rows of a call, N (row, slot) pairs in it, D hidden size, I expert
intermediate size. Pairs are in compressed sparse row form: row m has the pairs row_offsets[m]:row_offsets[m + 1].
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import torch

from experts.checkpoint.weight_format import QuantizedExpert
from experts.model.spec import ActivationKind, ActivationSpec, ExpertWeights
from experts.native.structs import NativeHints

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS: tuple[str, ...] = get_args(ActivationKind)


@dataclass(frozen=True)
class KernelShape:
    """What a kernel is built for; the same for all layers and slots of a shard."""

    quantized: ClassVar[bool] = False
    """Whether weights stay in a quantized format; True in `QuantizedShape`."""
    num_layers: int
    num_slots: int
    hidden_size: int
    intermediate_size: int
    activation: ActivationSpec
    has_bias: bool = False
    weight_on_input: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_slots", "hidden_size", "intermediate_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if self.activation.kind not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation.kind!r}, expected one of {', '.join(ACTIVATIONS)}")

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return torch.device(self.device).type

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights in this dtype, without any padding."""
        D, I = self.hidden_size, self.intermediate_size
        return (3 * D * I + (2 * I + D if self.has_bias else 0)) * self.dtype.itemsize


class ExpertKernel(ABC):
    """The weights of all slots of a shard, in this kernel's layout, and the MLP over them.

    One thread may call `set_slot` while another calls `forward`, as long as no forward uses that slot meanwhile. Only
    one thread at a time may call `forward`: it uses the kernel's scratch memory.

    An expert can also be copied as packed bytes from another kernel with the same `layout`: `begin_write`, write all of
    `slot_views`, `finish_write`.
    """

    name: ClassVar[str]
    takes_quantized: bool = False
    hints: NativeHints | None = None
    """Where the compute loop notes what routers say of the next layer; None: nobody wants to know."""

    def __init__(self, shape: KernelShape) -> None:
        if shape.quantized != self.takes_quantized:
            kind = "quantized weights" if self.takes_quantized else "plain floats"
            raise ValueError(f"kernel {self.name!r} cannot serve {shape}: it takes {kind}")
        reason = self.supports(shape)
        if reason is not None:
            raise ValueError(f"kernel {self.name!r} cannot serve {shape}: {reason}")
        self.shape = shape
        self._loaded_LS = np.zeros((shape.num_layers, shape.num_slots), dtype=np.bool_)
        self._memory: list[torch.Tensor] | None = None

    def make_ready(self) -> bool:
        """Make possible what the compiled form of `forward` refused last: it is called again, and `end_ready` after it.

        False if that is not possible: the call is one for `forward`, or for nobody.
        """
        return False

    def end_ready(self) -> None:  # noqa: B027 - for most kernels it is nothing
        """What `make_ready` did is needed no longer."""

    @classmethod
    @abstractmethod
    def supports(cls, shape: KernelShape) -> str | None:
        """None if this kernel can serve `shape` on this machine, else the reason."""

    def set_slot(self, layer: int, slot: int, weights: ExpertWeights | QuantizedExpert) -> None:
        """Pack one expert (`weights` of any float dtype, on any device) into a slot; the other slots keep serving.

        Kernels for quantized weights take a `QuantizedExpert` of their format, the others plain floats. Raises
        ValueError for a layer, slot, kind of weights or tensor shape that does not fit.
        """
        shape = self.shape
        if not (0 <= layer < shape.num_layers and 0 <= slot < shape.num_slots):
            raise ValueError(
                f"layer {layer} slot {slot}: expected layers below {shape.num_layers} and slots below {shape.num_slots}"
            )
        self._check_weights(weights)
        self.begin_write(layer, slot)
        self._pack(layer, slot, weights)
        self.finish_write(layer, slot)

    @classmethod
    def copies_as_bytes(cls) -> bool:
        """Whether its slots can be copied as bytes: to another shard, or from where they are offloaded to."""
        return cls._packing is not ExpertKernel._packing

    @property
    def layout(self) -> str:
        """What decides the bytes of a packed expert: those of kernels with equal layouts can be exchanged.

        Empty if this kernel's slots cannot be copied as bytes.
        """
        packing = self._packing()
        if not packing:
            return ""
        shape = self.shape
        kind = str(getattr(shape, "format", shape.dtype))
        sizes = f"{shape.hidden_size}x{shape.intermediate_size}"
        biases = "with biases" if shape.has_bias else "without biases"
        return f"{packing}; {kind} {shape.dtype} {sizes} {biases}, {shape.activation.kind}, {sys.byteorder}-endian"

    def _packing(self) -> str:
        """How this kernel packs an expert of a shape, with what else decides it on this machine; empty: a secret."""
        return ""

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The memory of a slot, uint8 [n] each on the shape's device; where there is a `layout`, all of the expert."""
        if self._memory is None:
            shape = self.shape
            self._memory = [
                tensor.view(-1).view(torch.uint8).view(shape.num_layers * shape.num_slots, -1)
                for tensor in self._weight_tensors()
            ]
        row = layer * self.shape.num_slots + slot
        return [memory[row] for memory in self._memory]

    @property
    def slot_device(self) -> str:
        """Where `slot_views` are."""
        return self.shape.device

    def begin_write(self, layer: int, slot: int) -> None:
        """The slot's memory is about to change: it holds no expert until `finish_write`."""
        self._loaded_LS[layer, slot] = False

    def finish_write(self, layer: int, slot: int) -> None:
        """All of the slot's memory is written."""
        self._loaded_LS[layer, slot] = True

    def _check_weights(self, weights: ExpertWeights | QuantizedExpert) -> None:
        """ValueError unless `weights` are one expert of this shape."""
        shape = self.shape
        D, I = shape.hidden_size, shape.intermediate_size
        if not isinstance(weights, ExpertWeights):
            raise ValueError(f"kernel {self.name!r} takes plain floats, not {weights.format.name} weights")
        expected: dict[str, tuple[int, ...]] = {"w13_2ID": (2 * I, D), "w2_DI": (D, I)}
        if shape.has_bias:
            expected |= {"b13_2I": (2 * I,), "b2_D": (D,)}
        for field in ("w13_2ID", "w2_DI", "b13_2I", "b2_D"):
            tensor = getattr(weights, field)
            found = None if tensor is None else tuple(tensor.shape)
            if found != expected.get(field):
                raise ValueError(f"{field} has shape {found}, expected {expected.get(field)}")

    @abstractmethod
    def _pack(self, layer: int, slot: int, weights: Any) -> None:
        """Write checked weights into this kernel's layout."""

    @abstractmethod
    def forward(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """out[m] = sum over the pairs n of row m of weights[n] * MLP_slots[n](rows[m]); zero if a row has no pair.

        `rows_MD` and `out_MD`: the shape's dtype and device, last dimension contiguous. `row_offsets_M1` and `slots_N`:
        int32 on the CPU; `weights_N`: float32 on the CPU. Sums are in float32. With `weight_on_input`, the weight
        scales the MLP's input instead. Raises ValueError for invalid pairs, before it computes anything.
        """

    def compiled_forward(self) -> tuple[int, int] | None:
        """Addresses of a function for rows that stand anywhere (`ForwardRows`, native/shard.h), and of its kernel.

        It releases nothing and checks its pairs as `forward` does. None if Python has to call this kernel.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most kernels have nothing to give back
        """Nothing of this kernel is used any more."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of this kernel's weights, padding included."""
        return sum(t.numel() * t.element_size() for t in self._weight_tensors())

    @abstractmethod
    def _weight_tensors(self) -> list[torch.Tensor]:
        """All tensors that hold weights."""

    def _check_call(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """ValueError unless the arguments of `forward` fit each other and this kernel's slots."""
        self._check_shapes(layer, rows_MD, row_offsets_M1, slots_N, weights_N, out_MD)
        offsets, slots = row_offsets_M1.numpy(), slots_N.numpy()
        M, N = rows_MD.shape[0], slots.shape[0]
        if offsets[0] != 0 or offsets[M] != N or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"row offsets must rise from 0 to the {N} pairs, found {offsets[0]} to {offsets[M]}")
        if N == 0:
            return
        if slots.min() < 0 or slots.max() >= self.shape.num_slots:
            raise ValueError(f"slots {slots.min()} to {slots.max()}, expected 0 to {self.shape.num_slots - 1}")
        if not self._loaded_LS[layer, slots].all():
            raise ValueError(f"layer {layer}: slot {slots[~self._loaded_LS[layer, slots]][0]} holds no expert")

    def _check_shapes(
        self,
        layer: int,
        rows_MD: torch.Tensor,
        row_offsets_M1: torch.Tensor,
        slots_N: torch.Tensor,
        weights_N: torch.Tensor,
        out_MD: torch.Tensor,
    ) -> None:
        """The part of `_check_call` that does not read the pairs."""
        shape = self.shape
        if not 0 <= layer < shape.num_layers:
            raise ValueError(f"layer {layer}, expected 0 to {shape.num_layers - 1}")
        M, D = rows_MD.shape
        if shape.hidden_size != D or out_MD.shape != rows_MD.shape:
            raise ValueError(
                f"rows {tuple(rows_MD.shape)} and out {tuple(out_MD.shape)}, expected both [{M}, {shape.hidden_size}]"
            )
        if rows_MD.dtype != shape.dtype or out_MD.dtype != shape.dtype:
            raise ValueError(f"rows are {rows_MD.dtype} and out {out_MD.dtype}, expected {shape.dtype}")
        if D > 1 and (rows_MD.stride(1) != 1 or out_MD.stride(1) != 1):
            raise ValueError("rows and out must be contiguous in the last dimension")
        if row_offsets_M1.dtype != torch.int32 or slots_N.dtype != torch.int32 or weights_N.dtype != torch.float32:
            raise ValueError(
                f"row offsets, slots and weights are {row_offsets_M1.dtype}, {slots_N.dtype} and {weights_N.dtype}, "
                "expected int32, int32 and float32"
            )
        if row_offsets_M1.shape != (M + 1,) or slots_N.shape != weights_N.shape or slots_N.dim() != 1:
            raise ValueError(
                f"row offsets {tuple(row_offsets_M1.shape)}, slots {tuple(slots_N.shape)}, weights "
                f"{tuple(weights_N.shape)}, expected [{M + 1}], [N], [N]"
            )
        if not (row_offsets_M1.is_contiguous() and slots_N.is_contiguous() and weights_N.is_contiguous()):
            raise ValueError("row offsets, slots and weights must be contiguous")
