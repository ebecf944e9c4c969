"""How ranks share a GPU, read from the library's file; needs neither a GPU nor NCCL."""

from __future__ import annotations

import os

import pytest
import torch

from experts.transports import nccl_sharing


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_HOSTID"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_HOSTID"):
        os.environ.pop(name, None)


def test_the_switch_is_looked_for_in_the_library(tmp_path):
    library = tmp_path / "libnccl.so.2"
    library.write_bytes(b"\x7fELF" + b"\0" * 5000 + b"MULTI_RANK_GPU_ENABLE\0" + b"\0" * 99)
    assert nccl_sharing.has_switch(library)
    library.write_bytes(b"\x7fELF" + b"\0" * 5000 + b"Duplicate GPU detected\0")
    assert not nccl_sharing.has_switch(library)


def test_nothing_is_set_unasked(environment):
    environment.setenv(nccl_sharing.SHARE_GPUS, "0")
    environment.setattr(nccl_sharing, "_library", lambda: pytest.fail("looked at the library"))
    nccl_sharing.share_gpus_if_asked()
    assert "NCCL_HOSTID" not in os.environ


@pytest.mark.parametrize("known", [False, True])
def test_processes_are_told_apart_where_the_switch_is_unknown(environment, known):
    environment.setenv(nccl_sharing.SHARE_GPUS, "1")
    environment.setenv("NCCL_HOSTID", "the parent's")
    environment.setattr(nccl_sharing, "_library", lambda: (known, "NCCL 2.x"))
    nccl_sharing.share_gpus_if_asked()
    assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert os.environ["NCCL_HOSTID"].endswith(f"-{os.getpid()}") != known
    assert ("sockets" in nccl_sharing.how_ranks_share()) != known


def test_ranks_take_turns_on_the_gpus(environment):
    environment.setattr(torch.cuda, "device_count", lambda: 1)
    assert nccl_sharing.spread(3) == ("cuda:0", ["cuda:0"] * 3)
    environment.setattr(torch.cuda, "device_count", lambda: 3)
    assert nccl_sharing.spread(3) == ("cuda:0", ["cuda:1", "cuda:2", "cuda:0"])
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no CUDA device"):
        nccl_sharing.spread(1)
