"""Several ranks on one GPU, for tests and benchmarks: NCCL refuses them unless it is told to, one way or the other.

    NCCL that knows NCCL_MULTI_RANK_GPU_ENABLE (2.30.7 does)   that switch
    older (torch 2.11 brings 2.28.9, which does not)           every process says that it is a host of its own
                                                               (NCCL_HOSTID), so that messages go over sockets

The second way shows that everything works, not how quick it is. A process does either when the environment says
EXPERTMESH_SHARE_GPUS=1, before it first uses NCCL.

Source: NCCL's check for duplicate GPUs compares the host's hash, which NCCL_HOSTID overrides (src/init.cc, src/misc/
utils.cc); the switch was found in the strings of NCCL 2.30.7 and not in those of 2.28.9.
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
    """(whether the NCCL that torch loads knows the switch, its version and file). Needs a build of torch with CUDA."""
    numbers = torch.cuda.nccl.version()  # loads it
    version = ".".join(map(str, numbers))
    if numbers < (2, 29):
        return False, f"NCCL {version}"
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libnccl" in line or "libtorch_cuda.so" in line}
    for path in sorted({path for path in paths if "libnccl" in path} or paths):  # else it is part of libtorch_cuda
        if knows_the_switch(Path(path)):
            return True, f"NCCL {version} in {Path(path).name}"
    return False, f"NCCL {version}"


def knows_the_switch(library: Path) -> bool:
    """Looks for the switch's name, which NCCL keeps without its prefix, in the file."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(_SWITCH.removeprefix("NCCL_").encode()) >= 0


def how_ranks_share() -> str:
    """In words, for the heading of figures."""
    known, library = _library()
    if known:
        return f"{library}: ranks share a GPU by {_SWITCH}"
    return f"{library} does not know {_SWITCH}: ranks that share a GPU talk over sockets, as hosts of their own"


def prepare() -> None:
    """Let this process's ranks share GPUs with those of others, if the environment asks for it."""
    if os.environ.get(SHARE_GPUS) == "1":
        _share(os.getpid(), _library()[0])


def _share(pid: int, known: bool) -> None:
    os.environ[_SWITCH] = "1"
    if not known:
        # Unconditionally: what a parent process set is the parent's identity.
        os.environ[_HOST_ID] = f"{socket.gethostname()}-{pid}"
        # All of them are on this host, whatever its network may be.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def spread(num_shards: int) -> tuple[str, list[str]]:
    """(a router's device, each shard's) on the GPUs of this machine: one each if they suffice, else shared.

    ValueError without a GPU.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError("torch sees no CUDA device")
    return "cuda:0", [f"cuda:{(1 + rank) % gpus}" for rank in range(num_shards)]
