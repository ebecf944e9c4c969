"""Quantized matrices in every format that is read, packed value by value as the formats' documentation has it, and what
they mean in float64.

Legend: P rows (outputs), Q columns (inputs) of a matrix; G groups of columns; codes are the integers or bits stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

GROUP = 32
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without its sign, which is the highest of four bits
# Integers that every format holds exactly, E2M1 as halves.
EXACT = (-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6)


@dataclass(frozen=True)
class Stored:
    """One matrix. `tensors`: by what follows the module's name, such as `qweight`. `values`: float64 [P, Q]."""

    tensors: dict[str, torch.Tensor]
    values: np.ndarray


@dataclass(frozen=True)
class Exact:
    """A matrix that all formats hold without rounding: integers [P, Q] times a power of two for each group [P, G]."""

    integers: np.ndarray
    power: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return self.integers * np.repeat(np.ldexp(1.0, self.power), GROUP, axis=1)

    def over(self, exponent: int) -> np.ndarray:
        """The values as integers of one power of two."""
        return np.ldexp(self.values, -exponent).astype(np.int64)


def exact(rows: int, columns: int, rng: np.random.Generator) -> Exact:
    """A random one."""
    return Exact(rng.choice(EXACT, (rows, columns)), rng.choice((-4, -5), (rows, columns // GROUP)))


def words(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words along an axis: value `order[i]` of each word's n is in its i-th lowest bits."""
    n = 32 // bits
    assert codes.min() >= 0
    assert codes.max() < 1 << bits
    moved = np.moveaxis(codes, axis, -1)
    out = np.zeros((*moved.shape[:-1], moved.shape[-1] // n), np.uint32)
    for i in range(n):
        out |= moved[..., order[i] if order else i :: n].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(out, -1, axis)).view(np.int32))


def meaning(codes: np.ndarray, zeros: np.ndarray | int, scale: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """(code - zero) * scale in float64, zeros and scales [P, G] by each column's group."""
    of_column = zeros if isinstance(zeros, int) else zeros[:, group_of]
    return (codes.astype(np.float64) - of_column) * scale.astype(np.float64)[:, group_of]


def scales(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Random ones around 0.03."""
    return torch.from_numpy(rng.uniform(0.01, 0.05, shape)).to(dtype)


def f64(tensor: torch.Tensor) -> np.ndarray:
    """Exactly the same values."""
    return tensor.to(torch.float64).numpy()


def in_runs(columns: int, group: int = GROUP) -> np.ndarray:
    """The group of each column where equal runs share one."""
    return np.arange(columns) // group


def e2m1(nibbles: np.ndarray) -> np.ndarray:
    """Values of four bits: a sign, and the place in `FP4`."""
    return np.array([FP4[code & 7] * (-1 if code & 8 else 1) for code in range(16)])[nibbles]


def halves(integers: np.ndarray) -> np.ndarray:
    """The four bits of half of each integer."""
    known = {k: FP4.index(abs(k) / 2) + 8 * (k < 0) for k in EXACT}
    return np.vectorize(known.__getitem__)(integers)


# --- the formats --------------------------------------------------------------------------------------------------

Maker = Callable[[int, int, np.random.Generator, Exact | None], Stored]


def awq(rows: int, columns: int, rng: np.random.Generator, like: Exact | None) -> Stored:
    """AutoAWQ, version gemm: packed along outputs, 0 2 4 6 1 3 5 7."""
    zeros = rng.integers(0, 16, (rows, columns // GROUP)) if like is None else rng.integers(6, 10, like.power.shape)
    group_of, order = in_runs(columns), (0, 2, 4, 6, 1, 3, 5, 7)
    if like is None:
        codes, scale = rng.integers(0, 16, (rows, columns)), scales(rng, *zeros.shape)
    else:
        codes, scale = like.integers + zeros[:, group_of], torch.from_numpy(np.ldexp(1.0, like.power)).half()
    tensors = {
        "qweight": words(codes.T, 4, 1, order),
        "qzeros": words(zeros.T, 4, 1, order),
        "scales": scale.t().contiguous(),
    }
    return Stored(tensors, meaning(codes, zeros, f64(scale), group_of))


def gptq(
    rows: int,
    columns: int,
    rng: np.random.Generator,
    like: Exact | None,
    bits: int = 4,
    version: int = 1,
    desc_act: bool = False,
) -> Stored:
    """AutoGPTQ: packed along inputs, zeros along outputs and, in version 1, less one; symmetric."""
    zero = 1 << (bits - 1)
    group_of = in_runs(columns)
    if desc_act:
        group_of = rng.permutation(group_of)
    if like is None:
        codes, scale = rng.integers(0, 1 << bits, (rows, columns)), scales(rng, rows, columns // GROUP)
    else:
        codes, scale = like.integers + zero, torch.from_numpy(np.ldexp(1.0, like.power)).half()
    zeros = np.full((columns // GROUP, rows), zero - (1 if version == 1 else 0))
    tensors = {
        "qweight": words(codes, bits, 1).t().contiguous(),
        "qzeros": words(zeros, bits, 1),
        "scales": scale.t().contiguous(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return Stored(tensors, meaning(codes, zero, f64(scale), group_of))


def packed(
    rows: int,
    columns: int,
    rng: np.random.Generator,
    like: Exact | None,
    bits: int = 4,
    channel: bool = False,
    symmetric: bool = True,
    actorder: bool = False,
) -> Stored:
    """compressed-tensors, pack-quantized: signed values with half the range added, zeros packed along outputs."""
    half, groups = 1 << (bits - 1), 1 if channel else columns // GROUP
    group_of = np.zeros(columns, np.int64) if channel else in_runs(columns)
    if actorder:
        group_of = rng.permutation(group_of)
    zeros = np.zeros((rows, groups), np.int64) if symmetric else rng.integers(-2, 2, (rows, groups))
    if like is None:
        signed, scale = rng.integers(-half, half, (rows, columns)), scales(rng, rows, groups, dtype=torch.bfloat16)
    elif channel:
        signed, scale = like.over(-5), torch.full((rows, 1), 2.0**-5).bfloat16()
    else:
        signed, scale = like.integers + zeros[:, group_of], torch.from_numpy(np.ldexp(1.0, like.power)).bfloat16()
    tensors = {
        "weight_packed": words(signed + half, bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros + half, bits, 0)
    if actorder:
        tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return Stored(tensors, meaning(signed, zeros, f64(scale), group_of))


def int8(rows: int, columns: int, rng: np.random.Generator, like: Exact | None, channel: bool = True) -> Stored:
    """compressed-tensors, int-quantized (W8A8)."""
    signed = rng.integers(-128, 128, (rows, columns)) if like is None else like.over(-5)
    scale = scales(rng, rows if channel else 1, 1, dtype=torch.bfloat16)
    if like is not None:
        scale = torch.full_like(scale, 2.0**-5)
    values = signed * np.broadcast_to(f64(scale), (rows, 1))
    return Stored(
        {"weight": torch.from_numpy(signed).to(torch.int8), "weight_scale": scale if channel else scale[0]}, values
    )


def fp8(
    rows: int,
    columns: int,
    rng: np.random.Generator,
    like: Exact | None,
    block: tuple[int, int] | None = None,
    number: tuple[int, ...] = (),
) -> Stored:
    """E4M3 with a scale for a block of rows and columns, by default the whole matrix, in a tensor of shape `number`."""
    codes = torch.from_numpy(rng.normal(0, 50, (rows, columns)) if like is None else like.over(-5).astype(np.float64))
    codes = codes.float().to(torch.float8_e4m3fn)
    high, wide = block or (rows, columns)
    scale = scales(rng, -(-rows // high), -(-columns // wide), dtype=torch.float32)
    if like is not None:
        scale = torch.full_like(scale, 2.0**-5)
    p, q = np.indices((rows, columns))
    values = f64(codes.float()) * f64(scale)[p // high, q // wide]
    return Stored({"weight": codes, "weight_scale": scale.reshape(number) if block is None else scale}, values)


def nvfp4(rows: int, columns: int, rng: np.random.Generator, like: Exact | None, modelopt: bool = False) -> Stored:
    """E2M1, an E4M3 scale for 16 columns, one float for the matrix: a divisor, or ModelOpt's factor."""
    nibbles = rng.integers(0, 16, (rows, columns))
    scale = scales(rng, rows, columns // 16, dtype=torch.float32).mul(2000).to(torch.float8_e4m3fn)
    whole = torch.tensor([1234.5])
    if like is not None:
        nibbles = halves(like.integers)
        scale = torch.from_numpy(np.ldexp(1.0, like.power + 9)).repeat_interleave(2, 1).float().to(torch.float8_e4m3fn)
        whole = torch.tensor([256.0])
    if modelopt:
        whole = 1 / whole
    p, q = np.indices((rows, columns))
    values = e2m1(nibbles) * f64(scale.float())[p, q // 16]
    values = values * float(whole) if modelopt else values / float(whole)
    data = torch.from_numpy((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8))
    if modelopt:
        tensors = {"weight": data, "weight_scale": scale, "weight_scale_2": whole[0], "input_scale": torch.tensor(0.1)}
    else:
        tensors = {"weight_packed": data, "weight_scale": scale, "weight_global_scale": whole}
        tensors["input_global_scale"] = torch.tensor([8.0])
    return Stored(tensors, values)


def mxfp4(rows: int, columns: int, rng: np.random.Generator, like: Exact | None) -> Stored:
    """E2M1 and a power of two for 32 columns, as compressed-tensors has it."""
    nibbles, power = rng.integers(0, 16, (rows, columns)), rng.integers(-9, 3, (rows, columns // 32))
    if like is not None:
        nibbles = halves(like.integers)
        power = like.power + 1
    data = torch.from_numpy((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8))
    tensors = {"weight_packed": data, "weight_scale": torch.from_numpy((power + 127).astype(np.uint8))}
    return Stored(tensors, e2m1(nibbles) * np.repeat(np.ldexp(1.0, power), 32, axis=1))


def compressed(form: str, kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """quantization_config as compressed-tensors writes it, with one group."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "actorder": None} | more
    rows: dict[str, Any] | None = None
    if form in ("int-quantized", "float-quantized"):
        rows = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    elif form == "nvfp4-pack-quantized":
        rows = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "dynamic": "local"}
        rows["group_size"] = 16
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": rows}},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Format:
    """A format for tests. `name`: what spec.quantization is; `kept`: the kernels' format, if they keep it."""

    name: str
    config: dict[str, Any]
    make: Maker
    kept: str | None = None


def _with(maker: Callable[..., Stored], **settings: Any) -> Maker:
    return lambda rows, columns, rng, like: maker(rows, columns, rng, like, **settings)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
_GROUPS = ("pack-quantized", "int", 4, "group")
FORMATS = {
    "awq": Format("awq", AWQ, awq),
    "gptq": Format("gptq", GPTQ, gptq, "int4"),
    "gptq_v2": Format("gptq", {**GPTQ, "checkpoint_format": "gptq_v2"}, _with(gptq, version=2), "int4"),
    "gptq_8_bits": Format("gptq", {**GPTQ, "bits": 8}, _with(gptq, bits=8)),
    "gptq_desc_act": Format("gptq", {**GPTQ, "desc_act": True}, _with(gptq, desc_act=True)),
    "int4": Format("int4", compressed(*_GROUPS, group_size=GROUP), packed, "int4"),
    "int4_channel": Format("int4", compressed(*_GROUPS[:3], "channel"), _with(packed, channel=True)),
    "int4_zeros": Format(
        "int4", compressed(*_GROUPS, group_size=GROUP, symmetric=False), _with(packed, symmetric=False)
    ),
    "int4_actorder": Format(
        "int4", compressed(*_GROUPS, group_size=GROUP, actorder="group"), _with(packed, actorder=True)
    ),
    "w8a16": Format("int8", compressed("pack-quantized", "int", 8, "channel"), _with(packed, bits=8, channel=True)),
    "w8a16_groups": Format(
        "int8", compressed("pack-quantized", "int", 8, "group", group_size=GROUP), _with(packed, bits=8)
    ),
    "w8a8": Format("int8", compressed("int-quantized", "int", 8, "channel"), int8),
    "w8a8_tensor": Format("int8", compressed("int-quantized", "int", 8, "tensor"), _with(int8, channel=False)),
    "fp8": Format("fp8_tensor", {"quant_method": "fp8", "activation_scheme": "static"}, fp8, "fp8_block"),
    "fp8_modelopt": Format("fp8_tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8, "fp8_block"),
    "fp8_tensor": Format(
        "fp8_tensor", compressed("float-quantized", "float", 8, "tensor"), _with(fp8, number=(1,)), "fp8_block"
    ),
    "fp8_channel": Format(
        "fp8_channel", compressed("float-quantized", "float", 8, "channel"), _with(fp8, block=(1, 1 << 20))
    ),
    "fp8_block": Format(
        "fp8_block", compressed("float-quantized", "float", 8, "block", block_structure=[128, 128]),
        _with(fp8, block=(128, 128)), "fp8_block",
    ),
    "nvfp4": Format("nvfp4", compressed("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=16), nvfp4),
    "nvfp4_modelopt": Format(
        "nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, _with(nvfp4, modelopt=True)
    ),
    "mxfp4": Format("mxfp4", compressed("mxfp4-pack-quantized", "float", 4, "group", group_size=32), mxfp4, "mxfp4"),
}  # fmt: skip
