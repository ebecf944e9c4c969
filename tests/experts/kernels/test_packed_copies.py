"""Experts copied as packed bytes from one kernel into another one compute the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experts.checkpoint.weight_format import WeightFormat
from experts.kernels import KERNELS, ExpertKernel, KernelShape
from experts.kernels.pick import random_pairs, random_weights
from experts.kernels.quantized import QuantizedShape
from experts.kernels.torch.dequant import TorchDequantKernel
from tests.support.kernel_cases import ACTIVATIONS, BASE, build, each_kernel

SHAPES = {
    "float32": BASE,
    "bfloat16": dataclasses.replace(BASE, dtype=torch.bfloat16),
    "biases": dataclasses.replace(BASE, has_bias=True, activation=ACTIVATIONS["swigluoai"]),
    "odd": dataclasses.replace(BASE, hidden_size=37, intermediate_size=19, dtype=torch.bfloat16, has_bias=True),
}


def copy_slot(source: ExpertKernel, target: ExpertKernel, layer: int, slot: int, target_slot: int) -> None:
    """As a shard does it."""
    assert source.layout == target.layout != ""
    target.begin_write(layer, target_slot)
    pairs = list(zip(source.slot_views(layer, slot), target.slot_views(layer, target_slot), strict=True))
    for theirs, ours in pairs:
        assert (theirs.dtype, ours.dtype, theirs.dim()) == (torch.uint8, torch.uint8, 1)
        assert theirs.is_contiguous()
        assert ours.is_contiguous()
        ours.copy_(theirs)
    target.finish_write(layer, target_slot)


def outputs(kernel: ExpertKernel, slots: torch.Tensor, layer: int) -> torch.Tensor:
    """One call with the same random rows and weights, through the given slots."""
    generator = torch.Generator().manual_seed(5)
    shape = kernel.shape
    rows_MD = torch.randn(13, shape.hidden_size, generator=generator).to(shape.dtype).to(shape.device)
    offsets, numbers, weights = random_pairs(13, shape.num_slots, 3, generator)
    out_MD = torch.empty_like(rows_MD)
    kernel.forward(layer, rows_MD, offsets, slots[numbers.long()], weights, out_MD)
    return out_MD


def check_copies(source: ExpertKernel, target: ExpertKernel) -> None:
    """Every expert, one slot further on."""
    num_slots = source.shape.num_slots
    there = torch.arange(1, num_slots + 1, dtype=torch.int32)  # in order, as kernels sum slot by slot
    for layer in range(source.shape.num_layers):
        for slot in range(num_slots):
            copy_slot(source, target, layer, slot, int(there[slot]))
        expected = outputs(source, torch.arange(num_slots, dtype=torch.int32), layer)
        generator = torch.Generator().manual_seed(5)
        rows_MD = torch.randn(13, source.shape.hidden_size, generator=generator).to(source.shape.dtype)
        offsets, numbers, weights = random_pairs(13, num_slots, 3, generator)
        out_MD = torch.empty_like(rows_MD)
        target.forward(layer, rows_MD.to(source.shape.device), offsets, there[numbers.long()], weights, out_MD)
        assert torch.equal(out_MD, expected), "bit by bit"
        assert expected.abs().max() > 0


@each_kernel(SHAPES)
def test_a_copied_expert_computes_the_same_bits(name: str, shape: KernelShape) -> None:
    source, _ = build(name, shape, seed=3)
    target = KERNELS[name](dataclasses.replace(shape, num_slots=shape.num_slots + 1))
    check_copies(source, target)


@pytest.mark.parametrize("form", [WeightFormat("fp8_block", 128), WeightFormat("mxfp4", 32), WeightFormat("int4", 32)])
def test_quantized_experts_are_copied_as_they_are(form: WeightFormat) -> None:
    shape = QuantizedShape(2, 4, 64, 96, ACTIVATIONS["silu"], format=form)
    source = TorchDequantKernel(shape)
    generator = torch.Generator().manual_seed(3)
    for layer in range(shape.num_layers):
        for slot in range(shape.num_slots):
            source.set_slot(layer, slot, random_weights(shape, generator))
    check_copies(source, TorchDequantKernel(dataclasses.replace(shape, num_slots=shape.num_slots + 1)))


@each_kernel({"float32": BASE})
def test_a_slot_is_empty_while_it_is_written(name: str, shape: KernelShape) -> None:
    kernel, _ = build(name, shape, seed=3)
    kernel.begin_write(0, 2)
    with pytest.raises(ValueError, match="slot 2 holds no expert"):
        outputs(kernel, torch.full((shape.num_slots,), 2, dtype=torch.int32), 0)
    assert torch.isfinite(outputs(kernel, torch.full((shape.num_slots,), 2, dtype=torch.int32), 1)).all()


@each_kernel({"float32": BASE})
def test_a_layout_tells_apart_what_is_packed_differently(name: str, shape: KernelShape) -> None:
    def layout(**changes: object) -> str | None:
        changed = dataclasses.replace(shape, **changes)  # type: ignore[arg-type]
        return None if KERNELS[name].supports(changed) else KERNELS[name](changed).layout

    ours = layout()
    others = [
        layout(dtype=torch.bfloat16),
        layout(hidden_size=32),
        layout(intermediate_size=32),
        layout(has_bias=True),
        layout(activation=ACTIVATIONS["swigluoai"]),
    ]
    served = [other for other in others if other is not None]
    assert len({ours, *served}) == len(served) + 1
    assert layout(num_layers=5, num_slots=9, weight_on_input=True) in (ours, None), "slots do not depend on these"


def test_kernels_that_keep_weights_as_they_are_can_exchange_them() -> None:
    loop, grouped = KERNELS["torch_loop"](BASE), KERNELS["grouped_mm"](BASE)
    assert loop.layout == grouped.layout
    assert loop.layout != KERNELS["native"](BASE).layout or KERNELS["native"].supports(BASE)
