"""Kernels of half precision add experts up in float32, to the last bit: in half precision the sums would be others."""

from __future__ import annotations

import pytest
import torch

from experts.kernels import KERNELS, KernelShape
from experts.model.spec import ActivationSpec, ExpertWeights

D, I = 64, 96
# From here on, the next number of each dtype is 2 further on: adding 1 and again 1 changes nothing in half precision.
TWO_APART = {torch.bfloat16: 256.0, torch.float16: 2048.0}


def constant(value: float, dtype: torch.dtype) -> ExpertWeights:
    """An expert whose output is exactly `value` everywhere for rows that begin with two ones: silu(64) * 1/64 is 1."""
    w13_2ID, w2_DI = torch.zeros(2 * I, D), torch.zeros(D, I)
    w13_2ID[:I, 0], w13_2ID[I:, 1], w2_DI[:, 0] = 64, 1 / 64, value
    return ExpertWeights(w13_2ID.to(dtype), w2_DI.to(dtype), None, None)


def output(name: str, dtype: torch.dtype, values: list[float], weights: list[float]) -> torch.Tensor:
    """[D]: what a kernel makes of one row that wants an expert for each of `values`, in this order of slots."""
    shape = KernelShape(1, 3, D, I, ActivationSpec("silu"), dtype=dtype)
    reason = KERNELS[name].supports(shape)
    if reason is not None:
        pytest.skip(reason)
    kernel = KERNELS[name](shape)
    for slot, value in enumerate(values):
        kernel.set_slot(0, slot, constant(value, dtype))
    for slot in range(len(values), 3):
        kernel.set_slot(0, slot, constant(0.0, dtype))
    rows_1D, out_1D = torch.zeros(1, D, dtype=dtype), torch.full((1, D), torch.nan, dtype=dtype)
    rows_1D[0, :2] = 1
    offsets, slots = torch.tensor([0, len(values)], dtype=torch.int32), torch.arange(len(values), dtype=torch.int32)
    kernel.forward(0, rows_1D, offsets, slots, torch.tensor(weights), out_1D)
    return out_1D[0]


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("dtype", TWO_APART)
@pytest.mark.parametrize("large", [0, 1, 2])
def test_experts_are_added_up_in_float32(name: str, dtype: torch.dtype, large: int) -> None:
    values = [1.0, 1.0, 1.0]
    values[large] = TWO_APART[dtype]
    assert output(name, dtype, values, [1.0] * 3).tolist() == [TWO_APART[dtype] + 2] * D


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize(
    ("dtype", "value", "weight", "expected"),
    [(torch.bfloat16, 250.0, 1 + 1.5 * 2**-9, 251.0), (torch.float16, 2000.0, 1 + 1.5 * 2**-12, 2001.0)],
)
def test_weights_of_the_gate_are_not_rounded(
    name: str, dtype: torch.dtype, value: float, weight: float, expected: float
) -> None:
    if name == "vllm_cpu":
        pytest.skip("vLLM's operation multiplies by the weight in the rows' dtype")
    assert torch.tensor(weight).to(dtype) == 1, "in half precision it would be no weight at all"
    assert output(name, dtype, [value], [weight]).tolist() == [expected] * D
