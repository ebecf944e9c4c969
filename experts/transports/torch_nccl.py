"""What the NCCL that torch loads can do, for those who place ranks on GPUs."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path

import torch

SHARE_A_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Environment variable: 1 lets several ranks of a communicator share a GPU. NCCL reads it when it is first used."""


@functools.cache
def ranks_can_share_a_gpu() -> tuple[bool, str]:
    """(whether this NCCL knows SHARE_A_GPU, its version and file); looks for the switch's name in the library.

    Needs a build of torch with CUDA. Source: the switch was found in the strings of NCCL 2.30.7.
    """
    version = ".".join(map(str, torch.cuda.nccl.version()))  # loads it
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libnccl" in line or "libtorch_cuda.so" in line}
    for path in sorted(paths, key=lambda p: "libnccl" not in p):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(SHARE_A_GPU.removeprefix("NCCL_").encode()) >= 0:
                return True, f"NCCL {version} in {Path(path).name}"
    return False, f"NCCL {version}"


def spread(num_shards: int) -> tuple[str, list[str]]:
    """(a router's device, each shard's) on the GPUs of this machine: one each if they suffice, else shared.

    ValueError, saying why, where these many ranks cannot be.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError("torch sees no CUDA device")
    if gpus > num_shards:
        return "cuda:0", [f"cuda:{1 + rank}" for rank in range(num_shards)]
    shared, library = ranks_can_share_a_gpu()
    if not shared:
        raise ValueError(f"{library} does not know {SHARE_A_GPU}, and there are {gpus} GPUs for {num_shards + 1} ranks")
    return "cuda:0", [f"cuda:{(1 + rank) % gpus}" for rank in range(num_shards)]
