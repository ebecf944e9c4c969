"""NcclGroup around a fake process group, which answers as torch's source does."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch

from experts.transports import torch_groups
from experts.transports.torch_groups import ROUTER, SHARD, NcclGroup


class Work:
    """Like ProcessGroupNCCL's work: is_success() always raises, wait() raises the work's error."""

    def __init__(self, error: str | None = None, done: bool = True) -> None:
        self.error, self.done = error, done

    def is_completed(self) -> bool:
        return self.done

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")

    def wait(self) -> None:
        if self.error is not None:
            raise RuntimeError(self.error)


class Group:
    """Every send and receive returns `work`."""

    def __init__(self) -> None:
        self.work = Work()
        self.aborted = threading.Event()
        self.calls: list[str] = []

    def send(self, *_: Any) -> Work:
        assert not self.aborted.is_set(), "the communicator is freed"
        self.calls.append("send")
        return self.work

    recv = send

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    made = Group()
    monkeypatch.setattr(torch_groups, "nccl_process_group", lambda *_: made)
    monkeypatch.setattr(torch_groups, "share_gpus_if_asked", lambda: None)
    return made


def pair(timeout_s: float = 5.0) -> NcclGroup:
    return NcclGroup(None, ROUTER, "cpu", timeout_s, lambda: None)  # type: ignore[arg-type]


def test_what_is_done_is_waited_for_without_asking_for_success(group: Group) -> None:
    made = pair()
    made.wait(made.send(torch.zeros(1, dtype=torch.uint8)), time.monotonic() + 5)


def test_what_went_wrong_is_a_lost_connection(group: Group) -> None:
    made = pair()
    group.work = Work("NCCL error: remote process exited")
    with pytest.raises(ConnectionError, match="remote process exited"):
        made.wait(made.send(torch.zeros(1, dtype=torch.uint8)), None)


def test_a_deadline_holds_while_the_gpu_waits(group: Group) -> None:
    made = pair()
    with pytest.raises(TimeoutError, match="no rows over NCCL"):
        made.wait(Work(done=False), time.monotonic() + 0.01)


def test_a_pair_that_does_not_get_through_is_freed(group: Group) -> None:
    group.work = Work(done=False)
    with pytest.raises(TimeoutError):
        pair(timeout_s=0.05)
    assert group.aborted.wait(5)


def test_after_an_abort_nothing_reaches_the_communicator(group: Group) -> None:
    made = pair()
    made.abort()
    made.abort()
    assert group.aborted.wait(5)
    group.calls.clear()
    for start in (made.send, made.recv):
        with pytest.raises(ConnectionError, match="the pair was closed"):
            start(torch.zeros(1, dtype=torch.uint8))
    assert group.calls == []


def test_a_group_is_made_without_watchdog_and_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, str] = {}

    class Options:
        def __init__(self, **_: Any) -> None:
            self.config = type("Config", (), {"blocking": 1})()

    def make(store: object, rank: int, size: int, options: Options) -> str:
        assert options.config.blocking == 0
        seen.update(os.environ)
        return "group"

    make.Options = Options  # type: ignore[attr-defined]
    bindings = type("Bindings", (), {"ProcessGroupNCCL": make})
    monkeypatch.setattr(torch_groups, "torch_bindings", lambda: bindings)
    for name in ("TORCH_NCCL_NONBLOCKING_TIMEOUT", "TORCH_FR_BUFFER_SIZE"):
        monkeypatch.setenv(name, "7")
    assert torch_groups.nccl_process_group(None, SHARD, 3.0) == "group"  # type: ignore[arg-type]
    assert seen["TORCH_NCCL_BLOCKING_WAIT"] == "1"
    assert seen["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ
    assert os.environ["TORCH_NCCL_NONBLOCKING_TIMEOUT"] == "7"
