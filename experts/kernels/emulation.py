"""Whether this processor computes a 16-bit dtype in float32 steps, and what that costs: for advice at start."""

from __future__ import annotations

import functools
import logging
import time

import torch

logger = logging.getLogger(__name__)

_ROWS, _WIDTH, _TURNS = 64, 1024, 5
_WORTH_A_WORD = 1.2


def is_emulated(dtype: torch.dtype, device: str) -> bool:
    """Whether torch's matrix products in `dtype` have no instructions of their own here (x86 needs AVX-512)."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a linear layer in `dtype` over its time in float32, on the CPU with torch's threads."""
    return _linear_s(dtype) / _linear_s(torch.float32)


def advice(dtype: torch.dtype, device: str) -> str | None:
    """A line for the log, if `dtype` is emulated and float32 is quicker by measurement; else None."""
    if not is_emulated(dtype, device) or (times := slowdown(dtype)) < _WORTH_A_WORD:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} is emulated on this processor: a linear layer of {_ROWS} rows takes {times:.1f} times as long as in "
        "float32; if there is memory for twice the bytes, set model.dtype to float32"
    )


def log_advice(dtype: torch.dtype, device: str) -> None:
    """Warn of an emulated dtype, where there is something to say."""
    if (line := advice(dtype, device)) is not None:
        logger.warning("%s", line)


def _linear_s(dtype: torch.dtype) -> float:
    """Seconds, the least of a few: other processes only ever add to a time."""
    x, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    times_s = []
    for _ in range(_TURNS + 1):
        start_s = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])
