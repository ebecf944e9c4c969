"""What the tests' own packing and our reading make of a format, against the libraries that write and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint.quantization.from_config import scheme_of
from tests.support.quantized_formats import FORMATS, GROUP, f64, words

P, Q = 64, 96


def read(name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """A matrix in float32, by our reader."""
    scheme = scheme_of(FORMATS[name].config, Path("config.json"))
    found = {}
    for piece in scheme.pieces(P, Q):
        module = "weight" + piece.suffix if not piece.suffix.startswith(".") else piece.suffix[1:]
        if module in stored or not piece.optional:
            found[piece.suffix] = stored[module]
    return scheme.dequantize(found, torch.float32)


@pytest.fixture(scope="module")
def vllm_utils() -> Any:
    return pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")


def test_awq_is_packed_as_vllm_does(vllm_utils: Any) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (Q, P))
    theirs = vllm_utils.awq_pack(torch.from_numpy(codes).int(), 4, Q, P)
    assert torch.equal(words(codes, 4, 1, (0, 2, 4, 6, 1, 3, 5, 7)), theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_packed_as_vllm_does(vllm_utils: Any, bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (Q, P))
    assert torch.equal(words(codes, bits, 0), vllm_utils.gptq_pack(torch.from_numpy(codes).int(), bits, Q, P))


def test_awq_is_read_as_vllms_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM turns AWQ into plain words of inputs, and zeros likewise, before a kernel takes them."""
    module = pytest.importorskip("vllm.model_executor.layers.quantization.auto_awq")
    stored = FORMATS["awq"].make(P, Q, np.random.default_rng(1), None).tensors
    layer = torch.nn.Module()
    for name in ("qweight", "qzeros"):
        layer.register_parameter(name, torch.nn.Parameter(stored[name].clone(), requires_grad=False))
    # Its parameter class asks for this worker's rank, of a group that no engine has made here.
    monkeypatch.setattr(
        module, "PackedvLLMParameter", lambda data, **more: torch.nn.Parameter(data, requires_grad=False)
    )
    module._convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    codes_QP = ((layer.qweight[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)
    zeros_PG = ((layer.qzeros[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)
    scale_GP = stored["scales"].double()
    values = (codes_QP.view(-1, GROUP, P).double() - zeros_PG.t()[:, None]) * scale_GP[:, None]
    assert torch.equal(read("awq", stored).double(), values.flatten(0, 1).t())


@pytest.mark.parametrize(
    ("name", "compressor"),
    [
        ("int4", "pack-quantized"),
        ("int4_channel", "pack-quantized"),
        ("int4_zeros", "pack-quantized"),
        ("int4_actorder", "pack-quantized"),
        ("w8a16", "pack-quantized"),
        ("w8a16_groups", "pack-quantized"),
        ("w8a8", "int-quantized"),
        ("w8a8_tensor", "int-quantized"),
        ("fp8_tensor", "float-quantized"),
        ("fp8_channel", "float-quantized"),
        ("nvfp4", "nvfp4-pack-quantized"),
        ("mxfp4", "mxfp4-pack-quantized"),
    ],
)
def test_compressed_tensors_decompresses_the_same(name: str, compressor: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = FORMATS[name].config["config_groups"]["group_0"]
    weights = {**config["weights"], "actorder": config["weights"].get("actorder")}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    stored = FORMATS[name].make(P, Q, np.random.default_rng(2), None).tensors
    theirs = compressors.BaseCompressor.get_value_from_registry(compressor).decompress(
        {key: tensor.clone() for key, tensor in stored.items()}, scheme
    )["weight"]
    ours = read(name, stored)
    # They multiply in the dtype of their scales, which keeps 8 bits of each product; NVFP4 has two.
    torch.testing.assert_close(theirs.float(), ours, rtol=2**-6 if name == "nvfp4" else 2**-7, atol=0)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_modelopt"])
def test_nvfp4_is_what_vllm_emulates(name: str) -> None:
    emulation = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    stored = FORMATS[name].make(P, Q, np.random.default_rng(3), None).tensors
    if name == "nvfp4":
        data, factor = stored["weight_packed"], 1 / stored["weight_global_scale"]
    else:
        data, factor = stored["weight"], stored["weight_scale_2"]
    theirs = emulation.dequantize_to_dtype(data, stored["weight_scale"], factor, torch.float32, 16, swizzle=False)
    torch.testing.assert_close(read(name, stored), theirs, rtol=2**-21, atol=0)


def test_the_largest_and_smallest_values_are_reached() -> None:
    """Of each format, so that no sign or highest bit is lost unnoticed."""
    for name, form in FORMATS.items():
        made = form.make(P, Q, np.random.default_rng(4), None)
        found = f64(read(name, made.tensors))
        assert found.min() < 0 < found.max(), name
        np.testing.assert_allclose([found.min(), found.max()], [made.values.min(), made.values.max()], rtol=2**-22)
