"""Every kernel against a float64 oracle, on fresh random inputs, into outputs full of NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels import KERNELS, ExpertKernel, KernelShape
from experts.kernels.pick import random_pairs, random_weights
from experts.model.spec import ActivationSpec, ExpertWeights

ACTIVATIONS = {
    "silu": ActivationSpec("silu"),
    "gelu": ActivationSpec("gelu"),
    "gelu_tanh": ActivationSpec("gelu_tanh"),
    "swigluoai": ActivationSpec("swigluoai", alpha=1.702, limit=7.0),
    "swigluoai_tight": ActivationSpec("swigluoai", alpha=1.3, limit=0.5),
    "swigluoai_open": ActivationSpec("swigluoai", alpha=1.702, limit=None),
}
# float32: sums of a few hundred products. Half precision: inputs are exact in both, so what is left is rounding the
# hidden activation, and each kernel's own steps, to 8 (11) bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BASE = KernelShape(2, 6, 64, 96, ACTIVATIONS["silu"])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def activation_f64(spec: ActivationSpec, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if spec.kind == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if spec.kind == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up
    if spec.kind == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    return gate / (1 + torch.exp(-spec.alpha * gate)) * (up + 1)


def oracle(shape, experts, rows_MD, offsets, slots, weights):
    """float64, pair by pair, from the formulas."""
    out = torch.zeros(rows_MD.shape, dtype=torch.float64)
    for m in range(rows_MD.shape[0]):
        for n in range(int(offsets[m]), int(offsets[m + 1])):
            expert, weight = experts[int(slots[n])], weights[n].double()
            x = rows_MD[m].double() * (weight if shape.weight_on_input else 1)
            h = expert.w13_2ID.double() @ x
            if expert.b13_2I is not None:
                h = h + expert.b13_2I.double()
            y = expert.w2_DI.double() @ activation_f64(shape.activation, *h.chunk(2))
            if expert.b2_D is not None:
                y = y + expert.b2_D.double()
            out[m] += y if shape.weight_on_input else weight * y
    return out


def build(name: str, shape: KernelShape, seed: int) -> tuple[ExpertKernel, list[list[ExpertWeights]]]:
    kernel_class = KERNELS[name]
    reason = kernel_class.supports(shape)
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(seed)
    kernel = kernel_class(shape)
    experts = [[random_weights(shape, generator) for _ in range(shape.num_slots)] for _ in range(shape.num_layers)]
    for layer, row in enumerate(experts):
        for slot, weights in enumerate(row):
            kernel.set_slot(layer, slot, weights)
    return kernel, experts


def check(kernel, experts, layer, rows_MD, offsets, slots, weights):
    shape = kernel.shape
    on_device = rows_MD.to(shape.device)
    out = torch.full_like(on_device, float("nan"))
    kernel.forward(layer, on_device, offsets, slots, weights, out)
    out_MD = out.cpu()
    expected = oracle(shape, experts[layer], rows_MD, offsets, slots, weights)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(out_MD.double(), expected, rtol=0, atol=TOLERANCE[shape.dtype] * scale)


def run_case(name: str, shape: KernelShape, num_rows: int, seed: int, pairs_per_row: int = 3) -> None:
    kernel, experts = build(name, shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows_MD = torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.dtype)
    pairs = random_pairs(num_rows, shape.num_slots, pairs_per_row, generator)
    for layer in range(shape.num_layers):
        check(kernel, experts, layer, rows_MD, *pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 13, 64, 130])
@pytest.mark.parametrize("name", KERNELS)
def test_row_counts(name, num_rows, dtype):
    run_case(name, dataclasses.replace(BASE, dtype=dtype), num_rows, seed=num_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_activations_and_biases(name, activation, has_bias, dtype):
    shape = dataclasses.replace(BASE, activation=ACTIVATIONS[activation], has_bias=has_bias, dtype=dtype)
    run_case(name, shape, 9, seed=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs_per_row", [1, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_weight_on_input(name, pairs_per_row, dtype):
    run_case(name, dataclasses.replace(BASE, weight_on_input=True, dtype=dtype), 7, 3, pairs_per_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "I"), [(80, 72), (33, 17), (1, 1), (520, 40), (1100, 8)])
@pytest.mark.parametrize("name", KERNELS)
def test_odd_sizes(name, D, I, dtype):
    run_case(name, dataclasses.replace(BASE, num_layers=1, hidden_size=D, intermediate_size=I, dtype=dtype), 15, seed=D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_uniform_pairs_one_expert_and_rows_without_pairs(name, dtype):
    kernel, experts = build(name, dataclasses.replace(BASE, dtype=dtype), seed=1)
    rows_MD = torch.randn(37, BASE.hidden_size).to(dtype)
    all_on_one = torch.arange(38, dtype=torch.int32), torch.full((37,), 4, dtype=torch.int32), torch.rand(37)
    check(kernel, experts, 1, rows_MD, *all_on_one)
    five_and_none = torch.tensor([5, 0], dtype=torch.int32).repeat(37)
    check(kernel, experts, 0, rows_MD, torch.arange(38, dtype=torch.int32) * 2, five_and_none, torch.rand(74))
    none = torch.zeros(38, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0)
    check(kernel, experts, 0, rows_MD, *none)


@pytest.mark.parametrize("name", KERNELS)
def test_views_with_wider_rows(name):
    kernel, experts = build(name, BASE, seed=2)
    D = BASE.hidden_size
    rows_MD = torch.randn(11, D + 24)[:, 8 : D + 8]
    offsets, slots, weights = random_pairs(11, BASE.num_slots, 3)
    out_wide = torch.full((11, D + 5), float("nan"))
    kernel.forward(0, rows_MD, offsets, slots, weights, out_wide[:, 3 : D + 3])
    expected = oracle(BASE, experts[0], rows_MD, offsets, slots, weights)
    torch.testing.assert_close(out_wide[:, 3 : D + 3].double(), expected, rtol=0, atol=1e-4)
    assert out_wide[:, :3].isnan().all()
    assert out_wide[:, D + 3 :].isnan().all()


@pytest.mark.parametrize("name", KERNELS)
def test_a_slot_can_be_replaced(name):
    kernel, experts = build(name, BASE, seed=3)
    experts[1][2] = random_weights(BASE, torch.Generator().manual_seed(99))
    kernel.set_slot(1, 2, experts[1][2])
    rows_MD = torch.randn(20, BASE.hidden_size)
    check(kernel, experts, 1, rows_MD, *random_pairs(20, BASE.num_slots, 3))


@pytest.mark.parametrize("name", KERNELS)
def test_bad_calls_are_named_and_the_kernel_lives_on(name):
    if KERNELS[name].supports(BASE) is not None:
        pytest.skip(str(KERNELS[name].supports(BASE)))

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    kernel = KERNELS[name](BASE)
    weights = random_weights(BASE)
    kernel.set_slot(0, 0, weights)
    rows, out = torch.randn(2, BASE.hidden_size), torch.empty(2, BASE.hidden_size)
    offsets, pair_weights = ints(0, 1, 2), torch.ones(2)

    cases = [
        ("slots -1 to 0", (0, rows, offsets, ints(0, -1), pair_weights, out)),
        ("slots 0 to 6", (0, rows, offsets, ints(0, 6), pair_weights, out)),
        ("slot 3 holds no expert", (0, rows, offsets, ints(0, 3), pair_weights, out)),
        (
            "row offsets must rise",
            (0, rows, ints(0, 3, 2), ints(0, 0), pair_weights, out),
        ),
        (
            "row offsets must rise",
            (0, rows, ints(0, 1, 1), ints(0, 0), pair_weights, out),
        ),
        (
            "row offsets must rise",
            (0, rows, ints(1, 1, 2), ints(0, 0), pair_weights, out),
        ),
        ("layer 2, expected 0 to 1", (2, rows, offsets, ints(0, 0), pair_weights, out)),
        ("expected torch.float32", (0, rows.bfloat16(), offsets, ints(0, 0), pair_weights, out)),
        ("expected both", (0, rows[:, :10], offsets, ints(0, 0), pair_weights, out)),
        ("expected int32", (0, rows, offsets.long(), ints(0, 0), pair_weights, out)),
        ("expected \\[3\\], \\[N\\], \\[N\\]", (0, rows, offsets, ints(0), pair_weights, out)),
        ("contiguous in the last", (0, rows, offsets, ints(0, 0), pair_weights, torch.empty(BASE.hidden_size, 2).t())),
    ]
    for match, args in cases:
        with pytest.raises(ValueError, match=match):
            kernel.forward(*args)
    with pytest.raises(ValueError, match="w13_2ID has shape"):
        kernel.set_slot(0, 0, dataclasses.replace(weights, w13_2ID=weights.w2_DI))
    with pytest.raises(ValueError, match="b2_D has shape"):
        kernel.set_slot(0, 0, dataclasses.replace(weights, b2_D=torch.zeros(BASE.hidden_size)))
    with pytest.raises(ValueError, match="slots below 6"):
        kernel.set_slot(0, 6, weights)
    kernel.forward(0, rows, offsets, ints(0, 0), pair_weights, out)
    expected = oracle(BASE, [weights], rows, offsets, ints(0, 0), pair_weights)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(name, data):
    shape = KernelShape(
        num_layers=1,
        num_slots=data.draw(st.integers(1, 9), "slots"),
        hidden_size=data.draw(st.integers(1, 12).map(lambda n: n * 8) | st.integers(1, 90), "D"),
        intermediate_size=data.draw(st.integers(1, 6).map(lambda n: n * 32) | st.integers(1, 90), "I"),
        activation=ACTIVATIONS[data.draw(st.sampled_from(sorted(ACTIVATIONS)), "activation")],
        has_bias=data.draw(st.booleans(), "bias"),
        weight_on_input=data.draw(st.booleans(), "weight on input"),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype"),
    )
    if KERNELS[name].supports(shape) is not None:
        return
    run_case(name, shape, data.draw(st.integers(0, 40), "rows"), data.draw(st.integers(0, 1000), "seed"))
