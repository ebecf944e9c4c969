"""Every Triton program, as it is launched, compiled for Hopper by Triton's real compiler; needs no GPU.

The interpreter accepts what only the compiler refuses (types, layouts, shared memory), and cannot multiply bfloat16.
Needs triton, without TRITON_INTERPRET. Run with -s to see the shared memory and warps of each program.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint.weight_format import WeightFormat
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import LoopbackLink
from experts.kernels import KernelShape
from experts.kernels.pick import random_pairs, random_weights
from experts.kernels.quantized import QuantizedShape
from experts.kernels.triton import mlp as triton_mlp
from experts.kernels.triton import quantized as triton_quantized
from experts.kernels.triton import tiles
from experts.model.spec import ActivationSpec
from experts.protocol.membership import Membership
from placement.placement import Placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler"),
]
HOPPER = 90
SHARED_BYTES = 227 * 1024  # of a block on sm_90
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
NOTHING = torch.zeros(0)
PAIRS = tiles.TiledPairs(16, 0, *5 * [NOTHING])
ALIGNED = [["tt.divisibility", 16]]


def signature_of(names: list[str], values: dict[str, Any], constants: set[str]) -> tuple[dict, dict, dict]:
    """(types, constants, attributes) that Triton's launcher derives from a call's arguments."""
    types: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        value = values[name]
        if name in constants or (isinstance(value, int) and value == 1):
            types[name], fixed[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[index,] = ALIGNED
        elif isinstance(value, int):
            types[name] = "i32"
            if value % 16 == 0:
                attributes[index,] = ALIGNED
        else:
            types[name] = "fp32"
    return types, fixed, attributes


@dataclasses.dataclass
class Compiled:
    """The launches that were compiled."""

    names: list[str] = dataclasses.field(default_factory=list)
    """The program of each launch, in order."""
    codes: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    """Triton's GPU code by program and kinds of arguments; no such pair is compiled twice."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Makes launches compile instead of run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    done = Compiled()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        names = list(self.arg_names)
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        options = {k: v for k, v in keywords.items() if k not in names}
        kind = signature_of(names, values, {p.name for p in self.params if p.is_constexpr})
        done.names.append(self.__name__)
        if (self.__name__, str((kind, options))) in done.codes:
            return
        types, fixed, attributes = kind
        source = ASTSource(fn=self, signature=types, constexprs=fixed, attrs=attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
        print(f"{self.__name__}: {kernel.metadata.shared} bytes shared, {kernel.metadata.num_warps} warps")
        assert kernel.metadata.shared <= SHARED_BYTES
        assert kernel.asm["cubin"]
        done.codes[self.__name__, str((kind, options))] = kernel.asm["ttgir"]

    monkeypatch.setattr(JITFunction, "run", run)
    for module in (triton_mlp, triton_quantized):
        monkeypatch.setattr(module, "triton_misfit", lambda shape: None)
    return done


def check_kernel(compiled: Compiled, kernel: Any) -> None:
    """Only the first call compiles, for every tile size; weights are prefetched."""
    forward(kernel, 4)
    sizes = len(tiles.each_block(PAIRS, kernel.shape.dtype))
    assert compiled.names == [*(sizes + 1) * ["gate_up", "down"], "sum_pairs"]  # and the call itself
    known = set(compiled.codes)
    for num_rows in (1, 5, 30, 61, 203):
        forward(kernel, num_rows)
    assert set(compiled.codes) == known
    for (name, _), code in compiled.codes.items():
        assert name == "sum_pairs" or "async_copy_global_to_local" in code or "async_tma_copy" in code


def forward(kernel: Any, num_rows: int) -> None:
    shape = kernel.shape
    for slot in range(shape.num_slots):
        kernel.set_slot(0, slot, random_weights(shape))
    rows_MD = torch.randn(num_rows, shape.hidden_size).to(shape.dtype)
    pairs = random_pairs(num_rows, shape.num_slots, 2, torch.Generator().manual_seed(num_rows))  # some in each call
    assert len(pairs[1]) > 0
    kernel.forward(0, rows_MD, *pairs, torch.empty_like(rows_MD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_plain_kernel(compiled, dtype):
    shape = KernelShape(1, 2, 256, 128, ActivationSpec("silu"), dtype=dtype)
    check_kernel(compiled, triton_mlp.TritonMlpKernel(shape))


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swigluoai"])
def test_activations_and_what_else_varies(compiled, kind):
    shape = KernelShape(
        1, 2, 200, 72, ActivationSpec(kind, limit=7.0), has_bias=True, weight_on_input=True, dtype=torch.bfloat16
    )
    forward(triton_mlp.TritonMlpKernel(shape), 20)
    assert set(compiled.names) == {"gate_up", "down", "sum_pairs"}


@pytest.mark.parametrize(
    "form", [WeightFormat("fp8_block", 128), WeightFormat("mxfp4", 32), WeightFormat("int4", 32)], ids=lambda f: f.name
)
def test_the_kernel_of_quantized_weights(compiled, form):
    shape = QuantizedShape(1, 2, 256, 128, ActivationSpec("silu"), dtype=torch.bfloat16, format=form)
    check_kernel(compiled, triton_quantized.TritonQuantizedKernel(shape))
    shape = dataclasses.replace(shape, activation=ActivationSpec("swigluoai", limit=7.0), has_bias=True)
    forward(triton_quantized.TritonQuantizedKernel(shape), 4)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
def test_dispatch_of_fixed_capacity(compiled, replicas, nodes):
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch

    shape = LayerShape(1, 256, 8, 7168, torch.bfloat16)
    dispatch = FixedDispatch(shape, 64, 8, nodes, replicas, torch.device("cpu"))
    x_TD = torch.randn(64, 7168).bfloat16()
    dispatch.pack(0, x_TD, torch.rand(64, 8), torch.zeros(64, 8, dtype=torch.int32))
    dispatch.combine(x_TD)
    chosen = ["choose_ranks"] if replicas else []
    assert compiled.names == [*chosen, "place_pairs", "pack_rows", "combine_rows"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_row_mover(compiled, dtype):
    """It compiles all that it launches later when it is made, so that no request waits for the compiler."""
    from experts.dispatch.rows.triton_mover import TritonRowMover, warm_up

    warm_up.cache_clear()
    shape = LayerShape(1, 2, 2, 128, dtype)
    links = {rank: LoopbackLink(rank, shape, 4) for rank in range(2)}
    for link in links.values():
        link.send_tensor = link.recv_tensor = torch.zeros(1 << 14, dtype=torch.uint8)
    mover = TritonRowMover(shape, 4, Membership(1, Placement.linear(1, 2, 2), (None, None)), links)
    launches = ["pack_rows", *3 * ["combine_rows"]]
    assert compiled.names == launches
    when_made = set(compiled.codes)
    batch = mover.stage(0, torch.zeros(4, 128, dtype=dtype), torch.ones(4, 2), torch.tensor([[0, 1]] * 4))
    plan = mover.plan_and_pack(batch, 1, np.array([[0, -1], [-1, 0]], np.int32))
    for answered in ([True, True], [True, False], [False, True]):  # all, some are kept, the others are added
        mover.combine(batch, plan, np.array(answered))
    assert compiled.names == 2 * launches
    assert set(compiled.codes) == when_made
