"""Which device a process is on: for pairs to know each other's, and for threads to work on their own."""

from __future__ import annotations

import functools

import torch

from experts.protocol.membership import CPU


@functools.cache
def identity_of(device: str) -> str:
    """CPU, or the UUID of the GPU: the same for all processes, whatever CUDA_VISIBLE_DEVICES says to each."""
    if not device.startswith("cuda"):
        return CPU
    return f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"


def with_index(device: str) -> str:
    """`device` with the index of the calling thread's GPU, so that other threads, which start on GPU 0, mean it too."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def use_device(device: str) -> None:
    """Have the calling thread launch on `device` from now on: threads start on GPU 0, and Triton obeys the thread."""
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)
