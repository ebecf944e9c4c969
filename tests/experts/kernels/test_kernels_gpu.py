"""The same oracle for every kernel that runs on CUDA devices."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experts.kernels import KERNELS
from tests.experts.kernels.test_kernels import ACTIVATIONS, BASE, run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CUDA = dataclasses.replace(BASE, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 13, 130, 700])
@pytest.mark.parametrize("name", KERNELS)
def test_row_counts(name, num_rows, dtype):
    run_case(name, dataclasses.replace(CUDA, dtype=dtype), num_rows, seed=num_rows)


@pytest.mark.parametrize("weight_on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_variants(name, activation, has_bias, weight_on_input):
    shape = dataclasses.replace(
        CUDA, activation=ACTIVATIONS[activation], has_bias=has_bias, weight_on_input=weight_on_input
    )
    run_case(name, shape, 9, seed=5)


@pytest.mark.parametrize(("D", "I"), [(80, 72), (33, 17), (1100, 8), (2048, 768)])
@pytest.mark.parametrize("name", KERNELS)
def test_sizes(name, D, I):
    run_case(name, dataclasses.replace(CUDA, num_layers=1, hidden_size=D, intermediate_size=I), 15, seed=D)
