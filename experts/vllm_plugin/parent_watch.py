"""An engine must not outlive its router: vLLM's engine process waits for requests for ever once its parent was killed.

It would keep the GPU's memory from the router that replaces it.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

logger = logging.getLogger(__name__)


def end_with_parent() -> bool:
    """End this process with the one that started it, by a thread that waits for that. Returns whether it does.

    An engine of one process calls it twice: as worker and as scheduler.

    False in a process that multiprocessing did not start: that is someone's own program with an engine inside.
    """
    return _start(os.getpid())


@functools.cache
def _start(pid: int) -> bool:
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    threading.Thread(target=_watch, args=(parent.sentinel, parent.pid), name="parent-watch", daemon=True).start()
    return True


def _watch(sentinel: int, pid: int | None) -> None:
    multiprocessing.connection.wait([sentinel])
    logger.error("process %s, which started this engine, is gone; the engine ends too", pid)
    # Not SIGTERM: vLLM would wait for running requests, whose answers nobody reads.
    os.kill(os.getpid(), signal.SIGKILL)
