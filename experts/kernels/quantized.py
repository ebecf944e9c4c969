"""What kernels that keep weights quantized have in common: their shape, random weights, and stacked tensors.

Legend as in base.py; B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from experts.checkpoint.dequantize import E8M0_BIAS
from experts.checkpoint.weight_format import QuantizedExpert, WeightFormat
from experts.kernels.base import ExpertKernel, KernelShape
from experts.model.spec import ExpertWeights


@dataclass(frozen=True)
class QuantizedShape(KernelShape):
    """A KernelShape whose weights stay in `format`; rows and biases are in `dtype` as usual."""

    quantized: ClassVar[bool] = True
    format: WeightFormat = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for columns in (self.hidden_size, self.intermediate_size):
            misfit = self.format.misfit(columns)
            if misfit is not None:
                raise ValueError(misfit)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights and scales, without any padding."""
        D, I = self.hidden_size, self.intermediate_size
        biases = (2 * I + D) * self.dtype.itemsize if self.has_bias else 0
        return self.format.expert_bytes(D, I, self.dtype) + biases

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a `QuantizedExpert`, by field."""
        D, I, form = self.hidden_size, self.intermediate_size, self.format
        p, q = form.scale_shape(I, D)
        shapes: dict[str, tuple[int, ...]] = {
            "w13_2IB": (2 * I, form.row_bytes(D)),
            "w13_scale": (2 * p, q),
            "w2_DB": (D, form.row_bytes(I)),
            "w2_scale": form.scale_shape(D, I),
        }
        return shapes | ({"b13_2I": (2 * I,), "b2_D": (D,)} if self.has_bias else {})


def random_quantized(shape: QuantizedShape, generator: torch.Generator | None = None) -> QuantizedExpert:
    """One random expert, on the CPU, scaled so that activations keep their size."""
    form, shapes = shape.format, shape.tensor_shapes()

    def data(name: str) -> torch.Tensor:
        found = torch.randint(0, 256, shapes[name], generator=generator, dtype=torch.uint8)
        if form.name == "fp8_block":
            found &= 0xBF  # values below 2 and no NaN, so that no few large values dominate a sum
        return found

    def scale(name: str, columns: int) -> torch.Tensor:
        # Root mean square of the random values: 0.5 for E4M3 below 2, 2.9 for E2M1, 4.6 for INT4.
        spread = {"fp8_block": 0.5, "mxfp4": 2.9, "int4": 4.6}[form.name] * columns**0.5
        factor = torch.rand(shapes[name], generator=generator) + 0.5
        if form.name == "mxfp4":
            return (factor.div(spread).log2().round() + E8M0_BIAS).to(torch.uint8)
        return (factor / spread).to(form.scale_dtype(shape.dtype))

    def bias(name: str) -> torch.Tensor | None:
        return (torch.randn(shapes[name], generator=generator) * 0.1).to(shape.dtype) if name in shapes else None

    return QuantizedExpert(
        form,
        w13_2IB=data("w13_2IB"),
        w13_scale=scale("w13_scale", shape.hidden_size),
        w2_DB=data("w2_DB"),
        w2_scale=scale("w2_scale", shape.intermediate_size),
        b13_2I=bias("b13_2I"),
        b2_D=bias("b2_D"),
    )


class QuantizedKernel(ExpertKernel):
    """An ExpertKernel over a `QuantizedShape`, whose slots take a `QuantizedExpert`."""

    takes_quantized = True
    shape: QuantizedShape

    def _check_weights(self, weights: ExpertWeights | QuantizedExpert) -> None:
        shape = self.shape
        if not isinstance(weights, QuantizedExpert):
            raise ValueError(f"kernel {self.name!r} takes {shape.format.name} weights, not plain floats")
        if weights.format != shape.format:
            raise ValueError(f"weights are {weights.format}, the slots hold {shape.format}")
        expected = shape.tensor_shapes()
        for name in ("w13_2IB", "w13_scale", "w2_DB", "w2_scale", "b13_2I", "b2_D"):
            tensor = getattr(weights, name)
            found = None if tensor is None else tuple(tensor.shape)
            if found != expected.get(name):
                raise ValueError(f"{name} has shape {found}, expected {expected.get(name)}")


class QuantizedStack:
    """All slots' weights as stacked tensors, laid out as in `QuantizedExpert`."""

    def __init__(self, shape: QuantizedShape) -> None:
        self._format = shape.format
        fields = shape.tensor_shapes()

        def zeros(name: str, dtype: torch.dtype) -> torch.Tensor:
            size = (shape.num_layers, shape.num_slots, *fields[name])
            return torch.zeros(size, dtype=dtype, device=shape.device)

        scale_dtype = shape.format.scale_dtype(shape.dtype)
        self.w13_LS2IB = zeros("w13_2IB", torch.uint8)
        self.w13_scale_LS = zeros("w13_scale", scale_dtype)
        self.w2_LSDB = zeros("w2_DB", torch.uint8)
        self.w2_scale_LS = zeros("w2_scale", scale_dtype)
        self.b13_LS2I = zeros("b13_2I", shape.dtype) if shape.has_bias else None
        self.b2_LSD = zeros("b2_D", shape.dtype) if shape.has_bias else None

    def _fields(self) -> dict[str, torch.Tensor | None]:
        return {
            "w13_2IB": self.w13_LS2IB,
            "w13_scale": self.w13_scale_LS,
            "w2_DB": self.w2_LSDB,
            "w2_scale": self.w2_scale_LS,
            "b13_2I": self.b13_LS2I,
            "b2_D": self.b2_LSD,
        }

    def write(self, layer: int, slot: int, weights: QuantizedExpert) -> None:
        """Copy one expert into a slot."""
        for name, stacked in self._fields().items():
            if stacked is not None:
                stacked[layer, slot].copy_(getattr(weights, name))

    def read(self, layer: int, slot: int) -> QuantizedExpert:
        """The expert of a slot, as views."""
        found: dict[str, Any] = {
            name: None if stacked is None else stacked[layer, slot] for name, stacked in self._fields().items()
        }
        return QuantizedExpert(self._format, **found)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors; without biases there are fewer."""
        return [stacked for stacked in self._fields().values() if stacked is not None]


class QuantizedStackKernel(QuantizedKernel):
    """A kernel that reads a `QuantizedStack`."""

    def __init__(self, shape: QuantizedShape) -> None:
        super().__init__(shape)
        self._weights = QuantizedStack(shape)

    def _pack(self, layer: int, slot: int, weights: QuantizedExpert) -> None:
        self._weights.write(layer, slot, weights)

    def _packing(self) -> str:
        return "stacked"

    def _weight_tensors(self) -> list[torch.Tensor]:
        return self._weights.tensors()
