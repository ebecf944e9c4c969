"""Kernels that keep weights quantized, against the float64 oracle on dequantized weights, into outputs full of NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import product

import pytest
import torch

from experts.checkpoint.weight_format import WeightFormat
from experts.kernels import KERNELS, KernelShape, keep_quantized, pick
from experts.kernels.pick import QUANTIZED_KERNELS, pick_kernel, random_pairs, random_weights
from experts.kernels.quantized import QuantizedShape
from experts.kernels.vllm.quantized import for_marlin
from tests.support.kernel_cases import ACTIVATIONS, TOLERANCE, each_kernel, oracle

FORMATS = {
    "fp8_block": WeightFormat("fp8_block", 128),
    "mxfp4": WeightFormat("mxfp4", 32),
    "int4": WeightFormat("int4", 32),
}
BASE = QuantizedShape(2, 5, 192, 160, ACTIVATIONS["silu"], format=FORMATS["fp8_block"])
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SERVED = {
    "triton_quantized": {"fp8_block", "mxfp4", "int4"},
    "vllm_fp8": {"fp8_block"},
    "vllm_int4": {"int4"},
    "vllm_mxfp4": {"mxfp4"},
    "torch_dequant": {"fp8_block", "mxfp4", "int4"},
}
# vLLM's FP8 kernel rounds rows and inner activations to E4M3's four bits, too.
ROUNDS_ROWS = {"vllm_fp8": 0.08}


def shape_for(device: str, form: str, **changes: object) -> QuantizedShape:
    """bfloat16 on GPUs. float32 and small on the CPU: Triton's interpreter is slow and cannot multiply bfloat16."""
    if device == "cpu":
        changes = {"num_slots": 4, "hidden_size": 64, "intermediate_size": 96, "dtype": torch.float32, **changes}
    else:
        changes = {"dtype": torch.bfloat16, **changes}
    return dataclasses.replace(BASE, **{"device": device, "format": FORMATS[form], **changes})


def run_case(name: str, shape: QuantizedShape, num_rows: int, seed: int, pairs_per_row: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernel = QUANTIZED_KERNELS[name](shape)
    rows_MD = torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.dtype)
    pairs = random_pairs(num_rows, shape.num_slots, pairs_per_row, generator)
    for layer in range(shape.num_layers):
        stored = [random_weights(shape, generator) for _ in range(shape.num_slots)]
        for slot, weights in enumerate(stored):
            kernel.set_slot(layer, slot, weights)
        experts = [weights.dequantize(torch.float32) for weights in stored]
        out_MD = torch.full((num_rows, shape.hidden_size), float("nan"), dtype=shape.dtype, device=shape.device)
        kernel.forward(layer, rows_MD.to(shape.device), *pairs, out_MD)
        expected = oracle(shape, experts, rows_MD, *pairs)
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        atol = max(TOLERANCE[shape.dtype], ROUNDS_ROWS.get(name, 0.0)) * scale
        torch.testing.assert_close(out_MD.cpu().double(), expected, rtol=0, atol=atol)


def each_case(labelled: Mapping[str, Mapping[str, object]], forms: Iterable[str] = FORMATS) -> pytest.MarkDecorator:
    """`name` and `shape` for changes to the base shape, by label; on this machine's devices, in each format."""
    shapes = {
        f"{device}-{form}-{label}": shape_for(device, form, **changes)
        for device, form, (label, changes) in product(DEVICES, forms, labelled.items())
    }
    return each_kernel(shapes)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("name", QUANTIZED_KERNELS)
def test_what_each_kernel_serves(name, device):
    """What it refuses is left out of the tests below."""
    sizes = {"hidden_size": 256, "intermediate_size": 128}  # multiples of every unit
    reasons = {form: QUANTIZED_KERNELS[name].supports(shape_for(device, form, **sizes)) for form in FORMATS}
    if None not in reasons.values():
        pytest.skip(f"{name}: {reasons[min(SERVED[name])]}")
    assert {form for form, reason in reasons.items() if reason is None} == SERVED[name], reasons


@pytest.mark.parametrize("num_rows", [0, 1, 13, 70])
@each_case({"base": {}})
def test_row_counts(name, shape, num_rows):
    run_case(name, shape, num_rows, seed=num_rows)


@each_case(
    {
        f"{activation}-{'bias' if has_bias else 'plain'}": {
            "num_layers": 1, "activation": ACTIVATIONS[activation], "has_bias": has_bias
        }
        for activation in ("gelu", "gelu_tanh", "swigluoai", "swigluoai_tight")
        for has_bias in (False, True)
    }
)  # fmt: skip
def test_activations_and_biases(name, shape):
    run_case(name, shape, 6, seed=5)


@each_case({"input": {"num_layers": 1, "weight_on_input": True}})
def test_weight_on_input(name, shape):
    run_case(name, shape, 6, seed=6)


# Blocks of 128 x 128 that are whole, partial in one matrix or both; rows shorter than a step.
@each_case(
    {
        f"{D}x{I}": {"num_layers": 1, "hidden_size": D, "intermediate_size": I}
        for D, I in [(256, 128), (128, 224), (320, 96), (32, 32)]
    }
)
def test_sizes(name, shape):
    run_case(name, shape, 9, seed=shape.hidden_size)


@each_case(
    {
        str(group): {
            "num_layers": 1, "hidden_size": 256, "intermediate_size": 128, "format": WeightFormat("int4", group)
        }
        for group in (16, 64, 128)
    },
    forms=["int4"],
)  # fmt: skip
def test_int4_groups(name, shape):
    run_case(name, shape, 9, seed=shape.format.group)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@each_kernel(
    {
        form: shape_for("cuda", form, num_layers=1, hidden_size=2048, intermediate_size=768)
        for form in (FORMATS if torch.cuda.is_available() else ())
    }
)
def test_large_on_gpus(name, shape):
    run_case(name, shape, 40, seed=1)


def test_fp8_values_are_all_met():
    """Every E4M3 byte except NaN has torch's value."""
    form = FORMATS["fp8_block"]
    data = torch.arange(256, dtype=torch.uint8).view(2, 128)
    got = form.dequantize(data, torch.tensor([[0.5]]), torch.float32)
    expected = data.view(torch.float8_e4m3fn).float() * 0.5
    finite = ~expected.isnan()
    assert finite.sum() == 254
    torch.testing.assert_close(got[finite], expected[finite], rtol=0, atol=0)


def test_int4_is_read_low_bits_first():
    got = FORMATS["int4"].dequantize(torch.tensor([[0x80, 0xF1] * 8]), torch.tensor([[2.0]]), torch.float32)  # 0 8 1 15
    assert got[0, :4].tolist() == [-16.0, 0.0, -14.0, 14.0]


@pytest.mark.parametrize("form", FORMATS)
def test_weights_stay_as_small_as_they_are_stored(form):
    shape = shape_for("cpu", form)
    kernel = pick_kernel(shape, "torch_dequant")
    plain = dataclasses.replace(BASE, dtype=torch.bfloat16)
    plain_bytes = 2 * 3 * plain.hidden_size * plain.intermediate_size
    assert kernel.resident_bytes == shape.num_layers * shape.num_slots * shape.expert_bytes
    assert random_weights(shape).nbytes == shape.expert_bytes
    assert shape.expert_bytes < {"fp8_block": 0.51, "mxfp4": 0.27, "int4": 0.32}[form] * plain_bytes


def test_what_does_not_fit_is_named():
    shape = shape_for("cpu", "mxfp4")
    kernel = pick_kernel(shape, "torch_dequant")
    weights = random_weights(shape)
    with pytest.raises(ValueError, match="w2_scale has shape"):
        kernel.set_slot(0, 0, dataclasses.replace(weights, w2_scale=weights.w13_scale))
    with pytest.raises(ValueError, match="takes mxfp4 weights, not plain floats"):
        kernel.set_slot(0, 0, weights.dequantize(torch.float32))
    with pytest.raises(ValueError, match=r"weights are WeightFormat\(name='int4'"):
        kernel.set_slot(0, 0, random_weights(shape_for("cpu", "int4")))
    plain_shape = KernelShape(1, 1, 64, 64, ACTIVATIONS["silu"])
    plain = pick_kernel(plain_shape, "torch_loop")
    with pytest.raises(ValueError, match="takes plain floats, not mxfp4 weights"):
        plain.set_slot(0, 0, weights)
    with pytest.raises(ValueError, match=r"'torch_loop' cannot serve .*: it takes plain floats"):
        KERNELS["torch_loop"](shape)
    with pytest.raises(ValueError, match=r"'torch_dequant' cannot serve .*: it takes quantized weights"):
        QUANTIZED_KERNELS["torch_dequant"](plain_shape)
    with pytest.raises(ValueError, match="100 columns are not a multiple of the 32"):
        shape_for("cpu", "mxfp4", hidden_size=100)
    with pytest.raises(ValueError, match="int4 with groups of 100"):
        WeightFormat("int4", 100)
    with pytest.raises(ValueError, match="'native' is unknown, expected auto or one of triton_quantized"):
        pick_kernel(shape, "native")


def test_what_a_shard_keeps_quantized():
    form, plain = FORMATS["int4"], KernelShape(1, 2, 64, 64, ACTIVATIONS["silu"])
    assert keep_quantized(plain, None) is plain
    assert keep_quantized(plain, form) is plain  # plain floats are faster on the CPU
    assert keep_quantized(plain, form, "torch_loop") is plain
    kept = keep_quantized(plain, form, "torch_dequant")
    assert isinstance(kept, QuantizedShape)
    assert (kept.format, kept.num_slots, kept.hidden_size) == (form, 2, 64)
    on_cuda = dataclasses.replace(plain, device="cuda", dtype=torch.bfloat16)
    assert keep_quantized(on_cuda, form).quantized == torch.cuda.is_available()


def test_auto_takes_one_that_keeps_the_format(monkeypatch):
    monkeypatch.setattr(pick, "_verdicts", {})
    assert pick_kernel(shape_for("cpu", "fp8_block", num_slots=2)).name in QUANTIZED_KERNELS


@pytest.mark.parametrize("interleave", [False, True], ids=["halves", "alternating"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_marlins_sizes_and_order_change_no_value(interleave, has_bias):
    shape = shape_for("cpu", "mxfp4", hidden_size=96, intermediate_size=160, has_bias=has_bias)
    stored = random_weights(shape)
    got, plain = for_marlin(stored, 256, 256, interleave), stored.dequantize(torch.float32)
    w13 = torch.cat([got.format.dequantize(*half, torch.float32) for half in zip(
        got.w13_2IB.chunk(2), got.w13_scale.chunk(2), strict=True
    )])  # fmt: skip
    gate, up = (w13[0::2], w13[1::2]) if interleave else w13.chunk(2)
    w2 = got.format.dequantize(got.w2_DB, got.w2_scale, torch.float32)
    assert (gate.shape, w2.shape) == ((256, 256), (256, 256))
    for found, expected in ((gate, plain.w13_2ID[:160]), (up, plain.w13_2ID[160:]), (w2, plain.w2_DI)):
        rows, columns = expected.shape
        torch.testing.assert_close(found[:rows, :columns], expected, rtol=0, atol=0)
        assert not found[rows:].any()
        assert not found[:, columns:].any()
    if has_bias:
        halves = (got.b13_2I[0::2], got.b13_2I[1::2]) if interleave else got.b13_2I.chunk(2)
        torch.testing.assert_close(torch.cat([half[:160] for half in halves]), stored.b13_2I)
        torch.testing.assert_close(got.b2_D[:96], stored.b2_D)
        assert got.b2_D.shape == (256,)
