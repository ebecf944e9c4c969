"""The GPU benchmarks and their two commands, rehearsed on the CPU: arguments, logic, tables, what they leave out.

Figures are not checked. The engine's benchmark is rehearsed without the engine.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import ROOT
from benchmarks.gpu import copy as gpu_copy
from benchmarks.gpu import engine as gpu_engine
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import round_trip as gpu_round_trip
from benchmarks.gpu import router as gpu_router
from benchmarks.gpu import suite as gpu
from benchmarks.gpu.common import Ceilings, Report, absent, arguments
from experts.dispatch.layer_shape import LayerShape
from experts.kernels import pick_kernel
from tests import run_gpu

SHAPE = LayerShape(1, 16, 4, 64, torch.float32)
CEILINGS = Ceilings(read_bytes_per_s=1e12, copy_bytes_per_s=1e12, matmul_flops=1e15)


def rehearse(main: Any, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", *more])
    threads = torch.get_num_threads()
    try:
        main()
    finally:
        torch.set_num_threads(threads)


def test_kernels(monkeypatch, capsys):
    rehearse(gpu_kernels.main, monkeypatch)
    text = capsys.readouterr().out
    for kernel in ("native", "torch_loop", "torch_dequant"):
        assert kernel in text
    assert "left out: tiny float32, kernel vllm_triton: it runs on CUDA" in text
    assert "a rehearsal on the CPU" in text


def test_the_shares_of_the_ceilings():
    """Worked by hand: 2 of 4 experts touched, 5 pairs of 3 rows; then enough pairs for work to be the bound."""
    shape = gpu_kernels.shape_of("tiny", "cpu", None)
    kernel = pick_kernel(shape, "torch_loop")
    found = {"pairs": 5.0, "slots": 2.0, "call_us": 9.0, "device_us": 2.0}
    row = gpu_kernels.row_of("float32", kernel, 3, found, CEILINGS)
    nbytes = 2 * (3 * 64 * 32) * 4 + 2 * 3 * 64 * 4
    assert row["GB/s"] == pytest.approx(nbytes / 2e-6 / 1e9)
    assert row["TFLOP/s"] == pytest.approx(5 * 6 * 64 * 32 / 2e-6 / 1e12)
    assert (row["bound"], row["goal"]) == ("memory", 0.8)
    assert row["share"] == pytest.approx(nbytes / 1e12 / 2e-6)
    busy = gpu_kernels.row_of("float32", kernel, 3, found | {"pairs": 1e6}, CEILINGS)
    assert (busy["bound"], busy["goal"]) == ("matmul", 0.7)
    assert busy["share"] == pytest.approx(1e6 * 6 * 64 * 32 / 1e15 / 2e-6)


def test_the_speed_up_over_vllm():
    rows = [
        {"weights": "a", "rows": 1, "kernel": "vllm_triton", "device_us": 30.0},
        {"weights": "a", "rows": 1, "kernel": "triton_mlp", "device_us": 20.0},
        {"weights": "b", "rows": 1, "kernel": "triton_mlp", "device_us": 20.0},
    ]
    gpu_kernels.beside_vllm(rows)
    assert [row["vllm's time over"] for row in rows] == [1.0, 1.5, "-"]


def test_the_shapes_that_are_measured_exceed_any_cache():
    for name, (hidden, width, slots, formats) in gpu_kernels.SHAPES.items():
        for form in (None, *formats):
            shape = gpu_kernels.shape_of(name, "cuda", form)
            assert (shape.hidden_size, shape.intermediate_size, shape.num_slots) == (hidden, width, slots)
            assert shape.dtype == torch.bfloat16
            assert 2 <= shape.num_layers <= 8
            assert shape.num_layers * slots * shape.expert_bytes < 40e9
    assert gpu_kernels.shape_of("deepseek-v3-8", "cuda", None).expert_bytes == gpu_copy.EXPERT_BYTES


def test_router(monkeypatch, capsys):
    rehearse(gpu_router.main, monkeypatch)
    text = capsys.readouterr().out
    assert "eager" in text
    assert "left out: fixed and captured, 3 tokens, replicas" in text


def test_replicas_stand_half_the_ranks_apart():
    placement = gpu_router.place(SHAPE, 4, replicas=True)
    held_ER = np.asarray(placement.slots_LER)[0] >= 0
    assert (held_ER.sum(1) == 2).all()
    for ranks in held_ER:
        first, second = np.flatnonzero(ranks)
        assert second - first == 2


def test_pairs_with_shards_as_processes():
    with gpu_peers.pool("cpu", 2, SHAPE) as peers:
        row = gpu_round_trip.measure(peers, "shm_split", 5, turns=1, count=2)
        assert row["shards"] == 2
        assert row["ratio"] > 0
        peers.order(gpu_copy.SENDER, "pair", "between", gpu_copy.ROUTER)
        peers.order(gpu_copy.RECEIVER, "pair", "between", gpu_copy.SHARD)
        peers.answer(gpu_copy.SENDER)
        peers.answer(gpu_copy.RECEIVER)
        dispatcher = peers.dispatcher(3, "gloo_split")
        step = gpu_router.step_of(SHAPE, 3, "cpu")
        rate, layers = gpu_copy.beside(peers, lambda: dispatcher.forward(0, *step), 4096, 1024, times=2)
        assert rate > 0
        assert layers
        assert dispatcher.lost == {}
        dispatcher.close()
        peers.order(0, "bare", "no such pair", 1, 1, 1)
        with pytest.raises(KeyError):
            peers.answer(0)


def test_engine_tables():
    order = {"dtype": "float32", "eager": True, "batches": [2]}
    plain = {"2": {"tokens_per_s": 10.0, "tokens": [[1, 2, 3, 4], [5, 6, 7, 8]]}}
    mesh = {"2": {"tokens_per_s": 8.0, "tokens": [[1, 2, 3, 4], [5, 9, 7, 8]]}}
    rows = gpu_engine.rows_of({"vllm": plain, "mesh": mesh}, order)
    assert [row["of plain"] for row in rows] == [1.0, 0.8]
    assert [row["same"] for row in rows] == ["2 of 2", "1 of 2"]
    assert [row["prefix"] for row in rows] == [1.0, 0.625]
    assert gpu_engine.engine_arguments(Path("m"), "bfloat16", False, "cuda")["gpu_memory_utilization"] < 0.5
    first, again = gpu_engine.prompts(3, 4, 100), gpu_engine.prompts(3, 4, 100)
    assert first == again
    assert len({tuple(ids) for ids in first}) == 3


def test_what_is_left_out_is_printed_twice(capsys):
    report = Report("some", "cpu")
    report.leave_out("this", "that is missing")
    report.table("an empty one", [])
    report.end()
    text = capsys.readouterr().out
    assert text.count("left out: this: that is missing") == 2
    assert text.count("left out: an empty one: it has no rows") == 2


def test_what_is_absent():
    assert absent("torch") is None
    assert absent("no_such_module") == "no_such_module is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit, match="2"):
        arguments("text")
    assert "sees no CUDA device" in capsys.readouterr().err


def test_the_benchmark_command_runs_each_in_a_process_and_ends_with_a_summary(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--only", "router,engine"])
    monkeypatch.setitem(gpu.BENCHMARKS, "engine", (60.0, ("no_such_module",)))
    assert gpu.main() == 1
    text = capfd.readouterr().out
    short = text[text.index("=== summary") :]
    assert "  router: done in" in short
    assert "left out: fixed and captured" in short
    assert "  engine: not run: no_such_module is not installed" in short


def test_the_benchmark_command_ends_what_hangs(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()  # or PYTHONPATH could lead to the real one
    (folder / "hangs.py").write_text("print('started', flush=True)\nimport time\ntime.sleep(600)\n")
    end, left_out = gpu.run("hangs", [], limit_s=1.0)
    assert (end, left_out) == ("ended after 1 s, its limit", [])


def test_the_benchmark_command_names_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "kernels,speed"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()


def test_the_test_command_names_what_it_cannot_run():
    files = run_gpu.gpu_files()
    assert "tests/experts/transports/test_nccl.py" in files
    done = subprocess.run(
        [sys.executable, "tests/run_gpu.py", "--list"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == len(files)
    assert "sees no CUDA device" in done.stdout
    assert done.stdout.count("FAIL tests/") == len(files)
    if importlib.util.find_spec("triton") is None:
        assert "test_fixed_dispatch.py: not run: triton missing" in done.stdout


@pytest.mark.parametrize(
    ("lines", "status", "expected"),
    [
        (["3 passed, 1 skipped in 2s"], 0, (True, "3 passed, 1 skipped in 2s")),
        (["= 1 failed, 3 passed in 2s ="], 1, (False, "1 failed, 3 passed in 2s")),
        (
            ["SKIPPED [2] tests/a.py:3: no such device", "2 skipped in 1s"],
            0,
            (False, "ran no test: 2 skipped in 1s; no such device"),
        ),
        ([], 139, (False, "pytest ended with status 139")),
    ],
)
def test_a_file_passes_if_some_test_did_and_none_failed(lines, status, expected):
    assert run_gpu.verdict(lines, status) == expected


def test_what_a_test_file_needs_is_read_from_its_imports():
    needs = {file: run_gpu.needs(file) for file in run_gpu.gpu_files()}
    assert not any({"ray", "vllm"} & packages for packages in needs.values())
    assert needs["tests/experts/transports/test_nccl.py"] >= {"torch", "numba", "pydantic", "safetensors"}
    assert "triton" not in needs["tests/experts/transports/test_nccl.py"]
    kernels = needs["tests/experts/kernels/test_kernels_gpu.py"]
    assert "torch" in kernels
    assert not {"triton", "pydantic"} & kernels


def test_gpu_tests_and_benchmarks_need_neither_ray_nor_vllm():
    """Nor pydantic, except for the tests of meshes."""
    modules = [f"benchmarks.gpu.{name}" for name in ("suite", "kernels", "router", "copy", "round_trip")]
    modules += [f"tests.experts.kernels.{name}" for name in ("test_kernels_gpu", "test_quantized")]
    modules += [
        "tests.experts.dispatch.captured.test_fixed_dispatch",
        "tests.experts.dispatch.captured.test_triton_plan",
    ]
    blocked = "for name in ('ray', 'vllm', 'pydantic'): sys.modules[name] = None"
    code = f"import sys\n{blocked}\nimport {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
