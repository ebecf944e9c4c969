"""The sweep of tile forms, rehearsed in Triton's interpreter; and what it says without Triton."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from benchmarks.gpu import tiles
from benchmarks.gpu.common import Ceilings
from benchmarks.gpu.kernels import shape_of
from experts.kernels.triton.forms import Form
from experts.kernels.triton.tiles import triton_misfit

FORMATS = [None, "fp8_block", "mxfp4", "int4"]


MISFIT = triton_misfit(shape_of("tiny", "cpu", None))
NOT_HERE = pytest.mark.skipif(MISFIT is not None, reason=str(MISFIT))


def run(monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tiles", "--device", "cpu", *more])
    threads = torch.get_num_threads()
    try:
        tiles.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch)
    assert "left out: tiny mxfp4: triton is not installed" in capsys.readouterr().out


@pytest.mark.triton
@NOT_HERE
def test_every_program_is_timed_beside_the_tables_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line and line[0] in ("bfloat16", "fp8_block", "mxfp4", "int4")]
    assert len(rows) == 4 * 2 * 2, "formats, programs, forms"
    assert sum(row[-1] == "True" for row in rows) == 4 * 2


@pytest.mark.triton
@NOT_HERE
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_call_runs_one_program_in_the_form_asked_for(format_name: str | None) -> None:
    kernel = tiles.kernel_of(shape_of("tiny", "cpu", format_name))
    call, module = tiles.Call(kernel, 3, 16), tiles.module_of(kernel.shape)
    before = dict(module.DOWN)
    launched = []

    def note(program: object, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        launched.append((grid, options["BLOCK_D"], options["BLOCK_I"], options["num_warps"], options["num_stages"]))

    only = tiles.Only("down", note)
    call.run(tiles.Candidate("down", 16, Form(32, 64, 8, 2)), only)
    assert only.seen == ["down"]
    [(grid, *sizes)] = launched
    assert sizes == [32, 64, 8, 2]
    assert 64 // 32 in grid
    assert before == module.DOWN


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", ["deepseek-v3-8", "gpt-oss-120b"])
def test_candidates_fit_and_the_tables_forms_are_among_them(name: str, format_name: str | None) -> None:
    shape = shape_of(name, "cuda", format_name)
    found = list(tiles.candidates(shape, quick=False))
    assert len(found) == len(set(found)) > 50
    module = tiles.module_of(shape)
    for program, table in (("gate_up", module.GATE_UP), ("down", module.DOWN)):
        for block, form in table.items():
            assert tiles.Candidate(program, block, form) in found
    for candidate in found:
        assert 128 % candidate.form.depth == 0 or format_name is None
    assert len(list(tiles.candidates(shape, quick=True))) < len(found)


def test_the_floor_is_bytes_or_work() -> None:
    """By hand: 3 rows of 4 pairs, 2/3 of the expert's bytes or operations for gate and up."""
    shape = shape_of("tiny", "cpu", None)
    call = tiles.Call.__new__(tiles.Call)
    call.kernel = type("", (), {"shape": shape})()  # type: ignore[assignment]
    call.num_pairs, call.num_slots = 12.0, 3.0
    by_bytes = Ceilings(read_bytes_per_s=1e9, copy_bytes_per_s=1.0, matmul_flops=1e18)
    by_work = Ceilings(read_bytes_per_s=1e18, copy_bytes_per_s=1.0, matmul_flops=1e9)
    assert call.floor_us("gate_up", by_bytes) == pytest.approx(3 * 2 * 64 * 32 * 4 / 1e9 * 1e6)
    assert call.floor_us("down", by_work) == pytest.approx(12 * 2 * 64 * 32 / 1e9 * 1e6)


def test_tiles_near_the_pairs_of_a_slot() -> None:
    assert [block for block in tiles.BLOCKS if tiles.near(block, 1, 128)] == [16]
    assert [block for block in tiles.BLOCKS if tiles.near(block, 40, 128)] == [16, 32, 64, 128]
    assert [block for block in tiles.BLOCKS if tiles.near(block, 1000, 128)] == [128]
    assert [block for block in tiles.BLOCKS[:3] if tiles.near(block, 1000, 64)] == [64]
