"""Priorities of single threads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cluster.priority import NICENESS, lower, threads_here

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")


@pytest.fixture
def threads() -> Iterator[list[int]]:
    """Native ids of two threads that wait until the test is over."""
    done = threading.Event()
    started = [threading.Thread(target=done.wait) for _ in range(2)]
    for thread in started:
        thread.start()
    yield [thread.native_id for thread in started if thread.native_id is not None]
    done.set()
    for thread in started:
        thread.join()


def niceness(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_threads_here_are_those_of_this_process(threads: list[int]) -> None:
    assert {threading.get_native_id(), *threads} <= set(threads_here())


def test_only_the_named_threads_are_lowered_and_their_children_with_them(threads: list[int]) -> None:
    before = niceness(threads[1])
    lower(threads[:1], before + 3)
    assert [niceness(thread) for thread in threads] == [before + 3, before]

    found: list[int] = []

    def child() -> None:
        found.append(niceness(threading.get_native_id()))

    def parent() -> None:
        lower([threading.get_native_id()], before + 2)
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    thread = threading.Thread(target=parent)
    thread.start()
    thread.join()
    assert found == [before + 2], "a thread inherits it from the one that starts it"


def test_a_thread_that_has_ended_is_left_out(threads: list[int]) -> None:
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    assert ended.native_id is not None
    lower([ended.native_id, threads[0]], niceness(threads[0]) + 1)
    assert niceness(threads[0]) == niceness(threads[1]) + 1


def test_one_that_is_lower_stays_so(threads: list[int]) -> None:
    before = niceness(threads[0])
    lower(threads[:1], before + 5)
    lower(threads[:1], before + 2)
    assert niceness(threads[0]) == before + 5


def test_a_whole_process_is_lowered_but_for_one_thread_and_what_it_starts() -> None:
    code = """
import os, threading
from cluster.priority import lower_all_but_one
started, seen = [], {}
def note(name): seen[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
def start(name):
    thread = threading.Thread(target=note, args=(name,))
    thread.start()
    thread.join()
before = os.getpriority(os.PRIO_PROCESS, 0)
pool = lower_all_but_one()
start("after")
pool.submit(start, "serving").result()
note("main")
print({name: value - before for name, value in seen.items()})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ast.literal_eval(found.stdout) == {"after": NICENESS, "serving": 0, "main": NICENESS}
