"""Waiting for something to become true. Every wait ends, and names what did not happen."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

AWAIT_S = 60.0
T = TypeVar("T")


def await_true(condition: Callable[[], Any], what: str, timeout_s: float = AWAIT_S, *, pause_s: float = 0.002) -> Any:
    """The first true value of `condition`, evaluated every `pause_s`; AssertionError names `what` did not happen."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(pause_s)
    return value


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """`await_true` for conditions that cost a request: evaluated five times a second."""
    return await_true(condition, what, timeout_s, pause_s=0.2)


def join(thread: threading.Thread, what: str, timeout_s: float = AWAIT_S) -> None:
    """Wait for a thread to end. Make it a daemon: else the interpreter waits for it again, without a limit."""
    thread.join(timeout_s)
    assert not thread.is_alive(), f"waited {timeout_s} s for {what}"


async def within(awaitable: Awaitable[T], what: str, timeout_s: float = AWAIT_S) -> T:
    """The result of `awaitable`; AssertionError names `what` did not happen."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():  # the awaitable's own
            raise
        raise AssertionError(f"waited {timeout_s} s for {what}") from None


def run_async(awaitable: Awaitable[T], what: str = "the whole test", timeout_s: float = AWAIT_S) -> T:
    """`within`, in an event loop of its own."""
    return asyncio.run(within(awaitable, what, timeout_s))


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A coroutine function as a test of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_async(test(*args, **kwargs), test.__name__)

    return run
