"""Two-rank groups of torch.distributed, one for each pair of a router and a shard.

Each group is built directly on the pair's own store (`rendezvous`), so it touches neither the default group (which vLLM
uses in a router's process) nor any registry of torch.distributed. Rank 0 is the router, rank 1 the shard.

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
from torch.distributed import Store

from experts.transports.nccl_sharing import share_gpus_if_asked

ROUTER, SHARD = 0, 1
_DATA_TAG, _BREAK_TAG = 0, 1
_FOREVER = timedelta(days=3650)
_ROUNDING_S = 0.002  # gloo counts in milliseconds
_YIELD_S = 500e-6  # how long a wait for a GPU yields its core before it sleeps
_POLL_INTERVAL_S = 20e-6  # how long each of those sleeps is


def seconds_left(deadline_s: float) -> float:
    """Seconds until `deadline_s` (time.monotonic()), at least 0.001 because 0 means "no limit" to torch."""
    return max(deadline_s - time.monotonic(), 0.001)


class PairGroup(ABC):
    """Sends and receives between the two ends of a pair, at most one of each in flight."""

    @abstractmethod
    def send(self, data: torch.Tensor) -> Any:
        """Start to send `data` (uint8). Keep the returned work until the peer is known to have the data."""

    @abstractmethod
    def recv(self, into: torch.Tensor) -> Any:
        """Start to receive into `into` (uint8); returns the work."""

    @abstractmethod
    def wait(self, work: Any, deadline_s: float | None) -> None:
        """Wait for `work`. TimeoutError at `deadline_s` (None: never), ConnectionError if the pair broke."""

    @abstractmethod
    def join(self, work: Any, deadline_s: float | None) -> None:
        """Order the caller's next steps after `work`. On a GPU the current stream waits, not the host, and the deadline
        does not apply; in host memory this is `wait`.
        """

    @abstractmethod
    def abort(self) -> None:
        """Break the pair: waits on it fail now, on both sides. Idempotent, does not block."""


def torch_bindings() -> Any:
    """torch's C++ process groups; its type stubs cover only half of them."""
    from torch._C import _distributed_c10d

    return _distributed_c10d


@functools.cache
def _gloo_device(address: str, pid: int) -> Any:
    """One device (a thread and a listening port) for all pairs of this process on one local address."""
    return torch_bindings().ProcessGroupGloo.create_device(hostname=address)


class GlooGroup(PairGroup):
    """TCP between hosts. A message may be shorter than the tensor that receives it."""

    def __init__(self, store: Store, rank: int, address: str, timeout_s: float) -> None:
        """Connect within `timeout_s`, over the interface with the local `address`. Raises RuntimeError."""
        bindings = torch_bindings()
        options = bindings.ProcessGroupGloo._Options()
        options._devices = [_gloo_device(address, os.getpid())]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1  # used by collectives only, and there are none
        self._peer = 1 - rank
        self._group = bindings.ProcessGroupGloo(store, rank, 2, options)

    def send(self, data: torch.Tensor) -> Any:
        return _or_connection_error(lambda: self._group.send([data], self._peer, _DATA_TAG))

    def recv(self, into: torch.Tensor) -> Any:
        return _or_connection_error(lambda: self._group.recv([into], self._peer, _DATA_TAG))

    def wait(self, work: Any, deadline_s: float | None) -> None:
        timeout = _FOREVER if deadline_s is None else timedelta(seconds=seconds_left(deadline_s))
        try:
            work.wait(timeout)
        except RuntimeError as error:
            if deadline_s is not None and time.monotonic() >= deadline_s - _ROUNDING_S:
                raise TimeoutError("no message over gloo before the deadline") from error
            raise ConnectionError(_first_line(error)) from error

    def join(self, work: Any, deadline_s: float | None) -> None:
        self.wait(work, deadline_s)

    def abort(self) -> None:
        # gloo has no cancel, but a receive that times out fails every operation of its pair and closes it.
        try:
            work = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _BREAK_TAG)
            work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            return


class NcclGroup(PairGroup):
    """CUDA tensors over NCCL, in the pair's own communicator.

    ProcessGroupNCCL runs sends and receives on the communicator's stream, after what the caller's stream has queued so
    far. The caller's stream waits for them only if told to (`join`).

    Pairs are not grouped (ncclGroupStart over several communicators): a group call fails and blocks as a whole, so one
    dead shard would hold up the messages to all others. The pairs' streams run concurrently instead.
    """

    def __init__(self, store: Store, rank: int, device: str, timeout_s: float, gone: Callable[[], str | None]) -> None:
        """Connect within `timeout_s`. `gone` returns why the peer is gone, or None while it is alive."""
        self._peer = 1 - rank
        self._gone = gone
        self._aborted = threading.Event()
        self._starting = threading.Lock()
        self._device = torch.device(device)
        share_gpus_if_asked()
        self._group = nccl_process_group(store, rank, timeout_s)
        # NCCL connects at the first message. Send one here, under the connect deadline.
        token = torch.zeros(1, dtype=torch.uint8, device=self._device)
        deadline_s = time.monotonic() + timeout_s
        try:
            for sender in (ROUTER, SHARD):
                self.wait(self.send(token) if rank == sender else self.recv(token), deadline_s)
        except BaseException:
            self.abort()
            raise

    def send(self, data: torch.Tensor) -> Any:
        return self._start(lambda: self._group.send([data], self._peer, _DATA_TAG))

    def recv(self, into: torch.Tensor) -> Any:
        return self._start(lambda: self._group.recv([into], self._peer, _DATA_TAG))

    def _start(self, operation: Callable[[], Any]) -> Any:
        """Start `operation`, but never while the communicator is freed: torch gives NCCL a bare pointer to it."""
        with self._starting:
            if self._aborted.is_set():
                raise ConnectionError("the pair was closed")
            return _or_connection_error(operation)

    def join(self, work: Any, deadline_s: float | None) -> None:
        # synchronize() makes the current stream wait for the work, also while a graph is captured.
        _or_connection_error(work.synchronize)

    def wait(self, work: Any, deadline_s: float | None) -> None:
        # Poll instead of blocking: a kernel that waits for a dead peer never ends by itself.
        start_s = time.monotonic()
        while True:
            try:
                if work.is_completed():
                    work.wait()  # does not block any more; raises the work's error (is_success() always raises)
                    return
            except RuntimeError as error:
                raise ConnectionError(_first_line(error)) from error
            reason = "the pair was closed" if self._aborted.is_set() else self._gone()
            if reason is not None:
                raise ConnectionError(reason)
            now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                raise TimeoutError("no rows over NCCL before the deadline")
            if now_s - start_s < _YIELD_S:
                os.sched_yield()
            else:
                time.sleep(_POLL_INTERVAL_S)

    def abort(self) -> None:
        # In a thread, because it waits for its own kernels to notice.
        if not self._aborted.is_set():
            self._aborted.set()
            threading.Thread(target=self._free, name="nccl-abort", daemon=True).start()

    def _free(self) -> None:
        # Not shutdown(): that waits for a peer that may be dead.
        with self._starting:
            self._group.abort()


_ENVIRONMENT_LOCK = threading.Lock()


def nccl_process_group(store: Store, rank: int, timeout_s: float) -> Any:
    """A process group without torch's watchdog and monitor; only environment variables turn those off.

    All groups of a process share their signals: one broken pair would make vLLM's own monitor end the router.
    """
    bindings = torch_bindings()
    settings = {
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    # torch reads these once in a process, at the first message, not when the group is made.
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(int(timeout_s) + 1))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # or torch records a Python traceback for each message
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


def _or_connection_error(operation: Callable[[], Any]) -> Any:
    """The result of `operation`, with torch's RuntimeError turned into ConnectionError."""
    try:
        return operation()
    except RuntimeError as error:
        raise ConnectionError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
