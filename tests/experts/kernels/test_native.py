"""What only the C++ kernel promises: the same bits for any batch and thread count, on every processor's code path."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch

from experts.kernels.native import kernel as native
from experts.kernels.native.kernel import NativeKernel
from experts.kernels.native.library import SOURCE, declare_functions
from experts.kernels.pick import random_pairs
from experts.native.build import compile_source, find_compiler
from tests.support.kernel_cases import ACTIVATIONS, BASE, build, run_case

pytestmark = pytest.mark.skipif(NativeKernel.supports(BASE) is not None, reason=str(NativeKernel.supports(BASE)))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_gets_the_bits_that_it_gets_in_a_batch(dtype, threads):
    threads(1)
    shape = dataclasses.replace(BASE, hidden_size=1200, num_layers=1, dtype=dtype)
    kernel, _ = build("native", shape, seed=0)
    rows_MD = torch.randn(70, 1200).to(dtype)
    offsets, slots, weights = random_pairs(70, shape.num_slots, 3)
    together, alone = torch.empty_like(rows_MD), torch.empty(1, 1200, dtype=dtype)
    kernel.forward(0, rows_MD, offsets, slots, weights, together)
    for m in range(70):
        pairs = slice(int(offsets[m]), int(offsets[m + 1]))
        offsets_12 = torch.tensor([0, pairs.stop - pairs.start], dtype=torch.int32)
        kernel.forward(0, rows_MD[m : m + 1], offsets_12, slots[pairs].clone(), weights[pairs].clone(), alone)
        assert torch.equal(alone[0], together[m])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 90])
def test_thread_counts_do_not_change_a_bit(num_rows, dtype, threads):
    kernel, _ = build("native", dataclasses.replace(BASE, has_bias=True, dtype=dtype), seed=0)
    rows_MD = torch.randn(num_rows, BASE.hidden_size).to(dtype)
    pairs = random_pairs(num_rows, BASE.num_slots, 3)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(torch.full_like(rows_MD, float("nan")))
        kernel.forward(1, rows_MD, *pairs, results[-1])
    for result in results[1:]:
        assert torch.equal(result, results[0])


@functools.cache
def variant(folder: Path, flag: str) -> ctypes.CDLL:
    target = folder / f"variant{flag}.so"
    compile_source(find_compiler(), SOURCE, target, flag)
    library = ctypes.CDLL(str(target))
    declare_functions(library)
    return library


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="builds code paths of x86_64")
@pytest.mark.parametrize("flag", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_processors_with_fewer_instructions(flag, monkeypatch, tmp_path_factory, threads):
    threads(1)
    library = variant(tmp_path_factory.getbasetemp(), flag)
    monkeypatch.setattr(native, "load_library", lambda: library)
    for dtype in DTYPES:
        for num_rows in (1, 40):
            run_case("native", dataclasses.replace(BASE, has_bias=True, dtype=dtype), num_rows, seed=1)
        odd = dataclasses.replace(BASE, hidden_size=33, intermediate_size=17, dtype=dtype)
        for activation in ACTIVATIONS.values():
            run_case("native", dataclasses.replace(odd, activation=activation), 9, seed=2)
