"""The error of an unreadable checkpoint, and what is said of formats that are not read at all."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be read; the message names the file, key or tensor, and what was expected."""


class UnreachableError(CheckpointError):
    """The hub or the store does not answer now; later it may."""


METHODS = "none, awq, gptq, compressed-tensors, fp8, mxfp4 or modelopt (FP8, NVFP4)"
"""What a quantization may be."""
GGUF = (
    "GGUF is not supported: experts are read from safetensors; take the model's safetensors, plain or quantized as "
    f"{METHODS.removeprefix('none, ')}"
)
