"""What pairs over mapped memory do besides what every transport does (`test_pairs`, `test_nccl`)."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experts.protocol.errors import ShardLostError, ShardRejectedError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.wire import H_ROWS, header_of
from experts.transports import connect as connect_module
from experts.transports.base import RouterLink
from experts.transports.connect import connect
from experts.transports.cuda_ipc import links
from experts.transports.cuda_ipc.rows import CannotMapError, HostRows, PairRows, make_rows, map_rows
from experts.transports.nccl_sharing import SHARE_GPUS
from tests.support.echo_shard import (
    ROW_BYTES,
    EchoShard,
    context,
    deadline_in,
    echo_shard,
    hello_for,
    post_body,
)
from tests.support.waiting import await_true

LONG_S = 30.0


@pytest.fixture(scope="module")
def shard() -> Iterator[EchoShard]:
    with echo_shard() as shard:
        yield shard


def is_kept(handle: bytes) -> bool:
    """Whether the process that made these rows still has them."""
    try:
        return "expertmesh-rows" in os.readlink(os.fsdecode(handle))
    except FileNotFoundError:  # at whatever moment it was closed
        return False


def handle_of(link: RouterLink) -> bytes:
    return bytes(link._rows.handle)  # type: ignore[attr-defined]


def test_both_ends_see_one_memory() -> None:
    made = make_rows(4096, "cpu")
    mapped = map_rows(made.handle, 4096, "cpu")
    assert not made.tensor.any()
    made.tensor[7] = 1
    mapped.tensor[4095] = 2
    assert (int(mapped.tensor[7]), int(made.tensor[4095])) == (1, 2)
    mapped.close()
    made.close()


@pytest.mark.parametrize("handle", [b"/proc/1/fd/no", b"", b"/dev/null"])
def test_what_is_no_memory_cannot_be_mapped(handle: bytes) -> None:
    with pytest.raises(CannotMapError):
        map_rows(handle, 4096, "cpu")


def test_a_shard_frees_rows_only_when_the_router_has_unmapped_them(
    shard: EchoShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of the router may be at it for a while after the link is closed."""
    may_unmap = threading.Event()
    link = shard.connect("shm_split")
    handle = handle_of(link)
    unmap = HostRows.close

    def unmap_late(rows: HostRows) -> None:
        assert may_unmap.wait(LONG_S)
        unmap(rows)

    monkeypatch.setattr(HostRows, "close", unmap_late)
    link.close()
    while shard.event() != ("left", "router"):
        continue
    assert is_kept(handle), "the shard has seen the router leave"
    may_unmap.set()
    await_true(lambda: not is_kept(handle), "the shard's freeing the rows")


def test_a_shard_frees_rows_of_a_router_that_was_killed() -> None:
    with echo_shard() as shard:
        ours, theirs = context().Pipe()
        router = context().Process(target=_connect_and_wait, args=(shard.endpoint, theirs), daemon=True)
        router.start()
        try:
            assert ours.poll(LONG_S), "a pair"
            handle = ours.recv()
            assert is_kept(handle)
        finally:
            router.kill()
            router.join(LONG_S)
        await_true(lambda: not is_kept(handle), "the shard's freeing the rows")


def _connect_and_wait(endpoint: ShardEndpoint, pipe: Any) -> None:
    link = connect(endpoint, hello_for("shm_split"), "cpu", 20.0, deadline_in(LONG_S))
    pipe.send(handle_of(link))
    signal.pause()


def test_rows_beyond_the_memory_are_refused_before_anything_is_told(shard: EchoShard) -> None:
    link = shard.connect("shm_split", capacity=4096)
    assert link.send_tensor is not None
    header = header_of(link.send_buffer)
    header[:] = 0
    for rows in (-1, len(link.send_tensor) // ROW_BYTES + 1):
        header[H_ROWS] = rows
        with pytest.raises(ValueError, match=f"the header announces {rows * ROW_BYTES} bytes of rows, expected 0 to"):
            link.post(len(link.send_buffer))
    header[H_ROWS] = 1
    with pytest.raises(ValueError, match="in a message of 1 bytes"):
        link.post(1)
    link.close()


class Noted(HostRows):
    """Writes down what is done to it."""

    def __init__(self, rows: PairRows, noted: list[str]) -> None:
        self.tensor, self.handle, self._noted = rows.tensor, rows.handle, noted

    def settle(self) -> None:
        self._noted.append("settle")

    def close(self) -> None:
        self._noted.append("close")


def test_a_router_waits_for_its_rows_before_it_tells_the_shard(
    shard: EchoShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    monkeypatch.setattr(links, "map_rows", lambda *args: Noted(map_rows(*args), noted))
    link = shard.connect("shm_split")
    post = link._headers.post  # type: ignore[attr-defined]

    def noted_post(nbytes: int) -> None:
        noted.append("post")
        post(nbytes)

    monkeypatch.setattr(link._headers, "post", noted_post)  # type: ignore[attr-defined]
    for rows in (1, 0):
        post_body(link, bytes(ROW_BYTES), num_rows=rows)
        link.wait(deadline_in(LONG_S))
    assert noted == ["settle", "post", "post"], "nothing to wait for without rows"
    link.close()
    await_true(lambda: noted[-1] == "close", "the unmapping")


def test_auto_goes_over_nccl_where_memory_cannot_be_mapped(shard: EchoShard, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def cannot(endpoint: Any, hello: Any, line: Any, *rest: Any) -> RouterLink:
        tried.append(hello.transport)
        raise CannotMapError("peer access is not supported")

    def over_nccl(endpoint: Any, hello: Any, line: Any, *rest: Any) -> RouterLink:
        tried.append(hello.transport)
        raise ShardLostError(endpoint.rank, "enough")

    monkeypatch.setattr(connect_module, "connect_cuda_ipc", cannot)
    monkeypatch.setattr("experts.transports.torch_pair.connect_torch", over_nccl)
    on_gpu = dataclasses.replace(shard.endpoint, device="GPU-1")
    with pytest.raises(ShardLostError, match="enough"):
        connect(on_gpu, hello_for("auto"), "cuda", 20.0, time.monotonic() + LONG_S)
    assert tried == ["cuda_ipc", "nccl"]
    with pytest.raises(ShardRejectedError, match="cannot be mapped here: peer access is not supported; use nccl"):
        connect(on_gpu, hello_for("cuda_ipc"), "cuda", 20.0, time.monotonic() + LONG_S)


def test_another_host_is_refused(shard: EchoShard) -> None:
    elsewhere = dataclasses.replace(shard.endpoint, host_id="elsewhere")
    with pytest.raises(ShardRejectedError, match="transport shm_split works within one host"):
        connect(elsewhere, hello_for("shm_split"), "cpu", 20.0, time.monotonic() + LONG_S)


def test_nccl_is_refused_by_name_on_one_gpu(shard: EchoShard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.delenv(SHARE_GPUS, raising=False)
    monkeypatch.setattr("experts.transports.torch_pair.identity_of", lambda device: "GPU-1")
    on_gpu = dataclasses.replace(shard.endpoint, device="GPU-1")
    with pytest.raises(ShardRejectedError, match="both on GPU GPU-1, and NCCL refuses two ranks on one GPU; use cuda"):
        connect(on_gpu, hello_for("nccl"), "cuda", 20.0, time.monotonic() + LONG_S)


@pytest.mark.gpu
def test_rows_on_a_gpu_reach_another_process() -> None:
    """The five calls themselves: a child maps the memory and writes to it."""
    import multiprocessing

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    context = multiprocessing.get_context("spawn")
    made = make_rows(4096, "cuda:0")
    child = context.Process(target=_write_there, args=(made.handle,))
    child.start()
    child.join(LONG_S * 2)
    assert child.exitcode == 0
    assert made.tensor.tolist() == [3] * 4096
    made.close()


def _write_there(handle: bytes) -> None:
    rows = map_rows(handle, 4096, f"cuda:{torch.cuda.device_count() - 1}")
    rows.tensor.fill_(3)
    rows.settle()
    rows.close()
