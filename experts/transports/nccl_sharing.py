"""Several ranks on one GPU, for tests and benchmarks. NCCL allows this in one of two ways:

    NCCL with NCCL_MULTI_RANK_GPU_ENABLE (2.30.7)       set that switch
    older NCCL (2.28.9, which comes with torch 2.11)    give each process its own NCCL_HOSTID, as if it were a host of
                                                        its own; messages then go over sockets

The second way shows that everything works, not how fast it is. A process does either one if EXPERTMESH_SHARE_GPUS=1 is
in the environment before it first uses NCCL.

Source: NCCL's check for duplicate GPUs compares the host's hash, and NCCL_HOSTID overrides it (src/init.cc, src/misc/
utils.cc). The switch is among the strings of NCCL 2.30.7 and not among those of 2.28.9.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
from pathlib import Path

import torch

SHARE_GPUS = "EXPERTMESH_SHARE_GPUS"
_SWITCH = "NCCL_MULTI_RANK_GPU_ENABLE"
_HOST_ID = "NCCL_HOSTID"


@functools.cache
def _library() -> tuple[bool, str]:
    """(whether the NCCL that torch loads has the switch, its version and file). Needs a build of torch with CUDA."""
    numbers = torch.cuda.nccl.version()  # loads it
    version = ".".join(map(str, numbers))
    if numbers < (2, 29):
        return False, f"NCCL {version}"
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libnccl" in line or "libtorch_cuda.so" in line}
    for path in sorted({path for path in paths if "libnccl" in path} or paths):  # else it is part of libtorch_cuda
        if has_switch(Path(path)):
            return True, f"NCCL {version} in {Path(path).name}"
    return False, f"NCCL {version}"


def has_switch(library: Path) -> bool:
    """Whether the file contains the switch's name, which NCCL stores without its prefix."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(_SWITCH.removeprefix("NCCL_").encode()) >= 0


def how_ranks_share() -> str:
    """How ranks share a GPU here, in words, to print above measurements."""
    known, library = _library()
    if known:
        return f"{library}: ranks share a GPU through {_SWITCH}"
    return f"{library} has no {_SWITCH}: ranks that share a GPU talk over sockets, as separate hosts"


def gpus_are_shared() -> bool:
    """Whether this process was asked to let its ranks share GPUs with others."""
    return os.environ.get(SHARE_GPUS) == "1"


def share_gpus_if_asked() -> None:
    """Let this process's ranks share GPUs with other processes', if EXPERTMESH_SHARE_GPUS=1."""
    if gpus_are_shared():
        _share(os.getpid(), _library()[0])


def _share(pid: int, known: bool) -> None:
    os.environ[_SWITCH] = "1"
    if not known:
        # Overwrite any value: one inherited from a parent process is the parent's identity.
        os.environ[_HOST_ID] = f"{socket.gethostname()}-{pid}"
        # All ranks are on this host, whatever its network.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def spread(num_shards: int) -> tuple[str, list[str]]:
    """(a router's device, each shard's device): one GPU each if there are enough, else shared ones.

    ValueError without a GPU.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError("torch sees no CUDA device, expected at least one")
    return "cuda:0", [f"cuda:{(1 + rank) % gpus}" for rank in range(num_shards)]
