"""Which threads leave the cores to those that serve tokens. On Linux each thread has a priority of its own.

A thread inherits it from the one that starts it, and without privileges it only goes down.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Iterable

NICENESS = 10
"""Of what no token waits for, such as imports, copies and calls between actors: a tenth of a core that others want."""


def threads_here() -> list[int]:
    """Native ids of this process's threads; none where the system does not tell."""
    return [int(name) for name in os.listdir("/proc/self/task")] if os.path.isdir("/proc/self/task") else []


def lower(threads: Iterable[int], niceness: int = NICENESS) -> None:
    """Lower the priority of threads; one that has ended is left out, and one that is lower stays so."""
    for thread in threads:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
                os.setpriority(os.PRIO_PROCESS, thread, niceness)


def lower_all_but_one() -> concurrent.futures.Executor:
    """Lower all threads of this process. What is returned runs calls, and the threads that they start, as before."""
    pool = concurrent.futures.ThreadPoolExecutor(1, "serving")
    kept = pool.submit(threading.get_native_id).result()
    lower(thread for thread in threads_here() if thread != kept)
    return pool
