"""The same oracle for every kernel that runs on CUDA devices."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

from experts.kernels import KERNELS
from tests.support.kernel_cases import ACTIVATIONS, BASE, TOLERANCE, each_kernel, run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CUDA = dataclasses.replace(BASE, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("native", "vllm_cpu")])
def test_what_runs_on_cuda(name):
    reasons = {dtype: KERNELS[name].supports(dataclasses.replace(CUDA, dtype=dtype)) for dtype in TOLERANCE}
    if None not in reasons.values():
        pytest.skip(f"{name}: {reasons[torch.bfloat16]}")
    assert reasons[torch.bfloat16] is None


@pytest.mark.parametrize("num_rows", [0, 1, 13, 130, 700])
@each_kernel({str(dtype).removeprefix("torch."): dataclasses.replace(CUDA, dtype=dtype) for dtype in TOLERANCE})
def test_row_counts(name, shape, num_rows):
    run_case(name, shape, num_rows, seed=num_rows)


@each_kernel(
    {
        f"{activation}-{'bias' if has_bias else 'plain'}-{'input' if on_input else 'output'}": dataclasses.replace(
            CUDA, activation=spec, has_bias=has_bias, weight_on_input=on_input
        )
        for (activation, spec), has_bias, on_input in product(ACTIVATIONS.items(), (False, True), (False, True))
    }
)
def test_variants(name, shape):
    run_case(name, shape, 9, seed=5)


@each_kernel(
    {
        f"{D}x{I}": dataclasses.replace(CUDA, num_layers=1, hidden_size=D, intermediate_size=I)
        for D, I in [(80, 72), (33, 17), (1100, 8), (2048, 768)]
    }
)
def test_sizes(name, shape):
    run_case(name, shape, 15, seed=shape.hidden_size)
