"""Advice about 16-bit dtypes on processors without instructions for them."""

from __future__ import annotations

import pytest
import torch

from experts.kernels import emulation


@pytest.mark.parametrize(
    ("dtype", "device", "supported", "times", "told"),
    [
        (torch.bfloat16, "cpu", False, 6.54, True),
        (torch.float16, "cpu", False, 6.54, True),
        (torch.bfloat16, "cpu", False, 0.9, False),  # emulated, and no slower
        (torch.bfloat16, "cpu", True, 6.54, False),
        (torch.float32, "cpu", False, 6.54, False),
        (torch.bfloat16, "cuda:0", False, 6.54, False),
    ],
)
def test_advice_is_given_where_float32_is_quicker(
    dtype: torch.dtype, device: str, supported: bool, times: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported)
    monkeypatch.setattr(emulation, "slowdown", lambda dtype: times)
    advice = emulation.advice(dtype, device)
    assert (advice is not None) == told
    if advice is not None:
        assert "takes 6.5 times as long as in float32" in advice
        assert "set model.dtype to float32" in advice


def test_a_dtype_is_measured_against_float32() -> None:
    emulation.slowdown.cache_clear()
    assert emulation.slowdown(torch.bfloat16) > 0
