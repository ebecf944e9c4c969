"""Every kernel against a float64 oracle, on random inputs, into outputs full of NaN."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels import KERNELS, KernelShape
from experts.kernels.pick import random_pairs, random_weights
from tests.support.kernel_cases import ACTIVATIONS, BASE, TOLERANCE, build, check, each_kernel, oracle, run_case

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
BY_DTYPE = {name: dataclasses.replace(BASE, dtype=dtype) for name, dtype in DTYPES.items()}
ON_CPU = {
    "native": {"float32", "bfloat16", "float16"},
    "vllm_cpu": {"float32", "bfloat16", "float16"},
    "vllm_triton": set(),
    "triton_mlp": {"float32", "float16"},  # in Triton's interpreter
    "grouped_mm": {"float32", "bfloat16", "float16"},
    "torch_loop": {"float32", "bfloat16", "float16"},
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_each_kernel_serves_on_the_cpu(name):
    """What it refuses is left out of the tests below."""
    reasons = {dtype: KERNELS[name].supports(shape) for dtype, shape in BY_DTYPE.items()}
    served = {dtype for dtype, reason in reasons.items() if reason is None}
    if not served:
        pytest.skip(f"{name}: {reasons['float32']}")
    assert served == ON_CPU[name], reasons


@pytest.mark.parametrize("num_rows", [0, 1, 2, 13, 64, 130])
@each_kernel(BY_DTYPE)
def test_row_counts(name, shape, num_rows):
    run_case(name, shape, num_rows, seed=num_rows)


@each_kernel(
    {
        f"{dtype}-{activation}-{'bias' if has_bias else 'plain'}": dataclasses.replace(
            shape, activation=spec, has_bias=has_bias
        )
        for (dtype, shape), (activation, spec), has_bias in product(
            BY_DTYPE.items(), ACTIVATIONS.items(), (False, True)
        )
    }
)
def test_activations_and_biases(name, shape):
    run_case(name, shape, 9, seed=5)


@pytest.mark.parametrize("pairs_per_row", [1, 3])
@each_kernel({dtype: dataclasses.replace(shape, weight_on_input=True) for dtype, shape in BY_DTYPE.items()})
def test_weight_on_input(name, shape, pairs_per_row):
    run_case(name, shape, 7, 3, pairs_per_row)


@each_kernel(
    {
        f"{dtype}-{D}x{I}": dataclasses.replace(shape, num_layers=1, hidden_size=D, intermediate_size=I)
        for dtype, shape in BY_DTYPE.items()
        for D, I in [(80, 72), (33, 17), (1, 1), (520, 40), (1100, 8)]
    }
)
def test_odd_sizes(name, shape):
    run_case(name, shape, 15, seed=shape.hidden_size)


@each_kernel(BY_DTYPE)
def test_uniform_pairs_one_expert_and_rows_without_pairs(name, shape):
    kernel, experts = build(name, shape, seed=1)
    rows_MD = torch.randn(37, BASE.hidden_size).to(shape.dtype)
    all_on_one = torch.arange(38, dtype=torch.int32), torch.full((37,), 4, dtype=torch.int32), torch.rand(37)
    check(kernel, experts, 1, rows_MD, *all_on_one)
    five_and_none = torch.tensor([5, 0], dtype=torch.int32).repeat(37)
    check(kernel, experts, 0, rows_MD, torch.arange(38, dtype=torch.int32) * 2, five_and_none, torch.rand(74))
    none = torch.zeros(38, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0)
    check(kernel, experts, 0, rows_MD, *none)


@each_kernel({"float32": BASE})
def test_views_with_wider_rows(name, shape):
    kernel, experts = build(name, shape, seed=2)
    D = BASE.hidden_size
    rows_MD = torch.randn(11, D + 24)[:, 8 : D + 8]
    offsets, slots, weights = random_pairs(11, BASE.num_slots, 3)
    out_wide = torch.full((11, D + 5), float("nan"))
    kernel.forward(0, rows_MD, offsets, slots, weights, out_wide[:, 3 : D + 3])
    expected = oracle(BASE, experts[0], rows_MD, offsets, slots, weights)
    torch.testing.assert_close(out_wide[:, 3 : D + 3].double(), expected, rtol=0, atol=1e-4)
    assert out_wide[:, :3].isnan().all()
    assert out_wide[:, D + 3 :].isnan().all()


@each_kernel({"float32": BASE})
def test_a_slot_can_be_replaced(name, shape):
    kernel, experts = build(name, shape, seed=3)
    experts[1][2] = random_weights(BASE, torch.Generator().manual_seed(99))
    kernel.set_slot(1, 2, experts[1][2])
    rows_MD = torch.randn(20, BASE.hidden_size)
    check(kernel, experts, 1, rows_MD, *random_pairs(20, BASE.num_slots, 3))


@each_kernel({"float32": BASE})
def test_bad_calls_are_named_and_the_kernel_lives_on(name, shape):
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    kernel = KERNELS[name](shape)
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


@each_kernel({"any": BASE})
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(name, shape, data):
    """Of those that the kernel serves: its dtypes and activations, and multiples of its sizes' unit."""

    def serves(**changes):
        return KERNELS[name].supports(dataclasses.replace(BASE, **changes)) is None

    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES.values() if serves(dtype=dtype)]), "dtype")
    activations = [label for label, spec in ACTIVATIONS.items() if serves(activation=spec)]
    unit = next(n for n in (1, 2, 4, 8, 16, 32) if serves(dtype=dtype, hidden_size=n, intermediate_size=n))
    sizes = st.integers(1, 96 // unit).map(lambda n: n * unit) | st.integers(1, 6).map(lambda n: n * 32)
    shape = KernelShape(
        num_layers=1,
        num_slots=data.draw(st.integers(1, 9), "slots"),
        hidden_size=data.draw(sizes, "D"),
        intermediate_size=data.draw(sizes, "I"),
        activation=ACTIVATIONS[data.draw(st.sampled_from(activations), "activation")],
        has_bias=data.draw(st.booleans(), "bias"),
        weight_on_input=data.draw(st.booleans(), "weight on input"),
        dtype=dtype,
    )
    run_case(name, shape, data.draw(st.integers(0, 40), "rows"), data.draw(st.integers(0, 1000), "seed"))
