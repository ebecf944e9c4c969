"""Two-rank groups of torch.distributed, one for each pair of a router and a shard, apart from every other group.

The process groups are made directly on a store of the pair's own (`rendezvous`), so neither the default group (which
vLLM has in a router's process) nor any registry of torch.distributed is touched. Rank 0 is the router, 1 the shard.

Source: how vLLM's `StatelessProcessGroup` and torch's own `new_group` build a backend from a PrefixStore.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from experts.transports.nccl_sharing import prepare

ROUTER, SHARD = 0, 1
_DATA_TAG, _BREAK_TAG = 0, 1
_FOREVER = timedelta(days=3650)
_ROUNDING_S = 0.002  # gloo counts in milliseconds
_EAGER_S, _POLL_S = 500e-6, 20e-6  # how long a wait for a GPU yields its core before it sleeps, and how long then


def seconds_left(deadline_s: float) -> float:
    """Until `deadline_s` on time.monotonic()'s clock; at least a millisecond, since 0 means "no limit" to torch."""
    return max(deadline_s - time.monotonic(), 0.001)


class PairGroup(ABC):
    """Sends and receives between the two ends of a pair; each of them is in flight at most once."""

    @abstractmethod
    def send(self, data: torch.Tensor) -> Any:
        """Begin to send `data` (uint8); returns the work, which must be kept until the peer is known to have it."""

    @abstractmethod
    def recv(self, into: torch.Tensor) -> Any:
        """Begin to receive into `into` (uint8)."""

    @abstractmethod
    def wait(self, work: Any, deadline_s: float | None) -> None:
        """Until `work` is done. TimeoutError at `deadline_s` (None: never), ConnectionError when the pair broke."""

    @abstractmethod
    def join(self, work: Any, deadline_s: float | None) -> None:
        """Put whatever the caller does next behind `work`: on a GPU its current stream waits, the host does not, and
        no deadline holds; in host memory it is `wait`.
        """

    @abstractmethod
    def abort(self) -> None:
        """Break the pair: what waits on it, on either side, fails now. Does not block, may be called twice."""


def _torch_bindings() -> Any:
    """torch's C++ process groups, of which its type stubs know only half."""
    from torch._C import _distributed_c10d

    return _distributed_c10d


@functools.cache
def _gloo_device(address: str, pid: int) -> Any:
    """One device, which is one thread and one listening port, for all pairs of this process on one local address."""
    return _torch_bindings().ProcessGroupGloo.create_device(hostname=address)


class GlooGroup(PairGroup):
    """TCP between hosts. A message may be shorter than the tensor that receives it."""

    def __init__(self, store: Store, rank: int, address: str, timeout_s: float) -> None:
        """Meet the other end within `timeout_s`, over the interface that has the local `address`. RuntimeError."""
        bindings = _torch_bindings()
        options = bindings.ProcessGroupGloo._Options()
        options._devices = [_gloo_device(address, os.getpid())]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1  # for collectives, of which there are none
        self._peer = 1 - rank
        self._group = bindings.ProcessGroupGloo(store, rank, 2, options)

    def send(self, data: torch.Tensor) -> Any:
        return _start(lambda: self._group.send([data], self._peer, _DATA_TAG))

    def recv(self, into: torch.Tensor) -> Any:
        return _start(lambda: self._group.recv([into], self._peer, _DATA_TAG))

    def wait(self, work: Any, deadline_s: float | None) -> None:
        limit = _FOREVER if deadline_s is None else timedelta(seconds=seconds_left(deadline_s))
        try:
            work.wait(limit)
        except RuntimeError as error:
            if deadline_s is not None and time.monotonic() >= deadline_s - _ROUNDING_S:
                raise TimeoutError("no message over gloo before the deadline") from error
            raise ConnectionError(_first_line(error)) from error

    def join(self, work: Any, deadline_s: float | None) -> None:
        self.wait(work, deadline_s)

    def abort(self) -> None:
        # gloo cancels nothing by itself, but a receive that times out fails every operation of its pair and closes it.
        try:
            work = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _BREAK_TAG)
            work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            return


class NcclGroup(PairGroup):
    """CUDA tensors over NCCL, in a communicator of the pair's own.

    Not run on a GPU yet: what is tested is the protocol around it, with gloo in its place.

    ProcessGroupNCCL runs sends and receives on a stream of the communicator's, behind what the caller's stream has
    queued so far; the caller's stream waits for none of them unless it is told to (`join`).

    Pairs are not grouped with one another (ncclGroupStart over several communicators): a group call fails and blocks as
    a whole, so one dead shard would take the others' messages with it. Their streams run side by side instead.
    """

    def __init__(self, store: Store, rank: int, device: str, timeout_s: float, gone: Callable[[], str | None]) -> None:
        """Meet the other end within `timeout_s`. `gone` says why the peer is gone, or None while it lives."""
        self._peer = 1 - rank
        self._gone = gone
        self._aborted = threading.Event()
        self._starting = threading.Lock()
        self._device = torch.device(device)
        prepare()
        self._group = _nccl_group(store, rank, timeout_s)
        # NCCL connects at the first message; that has to happen here, under the connect deadline.
        token = torch.zeros(1, dtype=torch.uint8, device=self._device)
        deadline_s = time.monotonic() + timeout_s
        try:
            for sender in (ROUTER, SHARD):
                self.wait(self.send(token) if rank == sender else self.recv(token), deadline_s)
        except BaseException:
            self.abort()
            raise

    def send(self, data: torch.Tensor) -> Any:
        return self._begin(lambda: self._group.send([data], self._peer, _DATA_TAG))

    def recv(self, into: torch.Tensor) -> Any:
        return self._begin(lambda: self._group.recv([into], self._peer, _DATA_TAG))

    def _begin(self, operation: Callable[[], Any]) -> Any:
        """Not while the communicator is being freed: torch hands NCCL a bare pointer to it."""
        with self._starting:
            if self._aborted.is_set():
                raise ConnectionError("the pair was closed")
            return _start(operation)

    def join(self, work: Any, deadline_s: float | None) -> None:
        # synchronize() makes the current stream wait for the work's end, also while a graph is captured.
        _start(work.synchronize)

    def wait(self, work: Any, deadline_s: float | None) -> None:
        # Ask, do not block: a kernel that waits for a dead peer never ends by itself.
        start_s = time.monotonic()
        while True:
            try:
                if work.is_completed():
                    work.wait()  # over, so it does not block; raises what went wrong (is_success() always does)
                    return
            except RuntimeError as error:
                raise ConnectionError(_first_line(error)) from error
            reason = "the pair was closed" if self._aborted.is_set() else self._gone()
            if reason is not None:
                raise ConnectionError(reason)
            now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                raise TimeoutError("no rows over NCCL before the deadline")
            if now_s - start_s < _EAGER_S:
                os.sched_yield()
            else:
                time.sleep(_POLL_S)

    def abort(self) -> None:
        # In a thread, since it waits for its own kernels to notice.
        if not self._aborted.is_set():
            self._aborted.set()
            threading.Thread(target=self._free, name="nccl-abort", daemon=True).start()

    def _free(self) -> None:
        # abort() and never shutdown(): the latter waits for a peer that may be dead.
        with self._starting:
            self._group.abort()


_ENVIRONMENT_LOCK = threading.Lock()


def _nccl_group(store: Store, rank: int, timeout_s: float) -> Any:
    """A process group without torch's watchdog and monitor, which it knows from the environment only.

    Their signals are shared by all groups of a process: a pair that broke would have vLLM's own monitor end the router.
    """
    bindings = _torch_bindings()
    settings = {
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    # Read once a process, at the first message, not when the group is made.
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(int(timeout_s) + 1))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # a Python traceback for each message, otherwise
    options = bindings.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timedelta(seconds=timeout_s)
    options.config.blocking = 0
    with _ENVIRONMENT_LOCK:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            return bindings.ProcessGroupNCCL(store, rank, 2, options)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def meet(store: Store, label: str) -> PrefixStore:
    """The part of a pair's store that one group of it uses."""
    return PrefixStore(label, store)


def _start(operation: Callable[[], Any]) -> Any:
    """What `operation` returns; ConnectionError where torch has only its RuntimeError."""
    try:
        return operation()
    except RuntimeError as error:
        raise ConnectionError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
