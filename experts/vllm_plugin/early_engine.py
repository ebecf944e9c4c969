"""An engine's process, started before its engine is known: it imports vllm while the router does the same.

vLLM starts that process when its own imports are done, and in a Ray actor it must spawn it; the imports then happen
twice, one after the other. Here the process waits with its imports done, and vLLM's `start` hands it the job.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

logger = logging.getLogger(__name__)

# None of ours: vLLM's CPU worker fails to start in a process that imported numba first.
MODULES = ("vllm.v1.engine.core",)
# What may be read while modules are imported. If one differs by the time the job comes, the process is of no use.
READ_BY_IMPORTS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VLLM_TARGET_DEVICE", "VLLM_PLUGINS")


class EarlyEngine(SpawnProcess):
    """A process for one engine. `vllm_uses` lets the next engine that vLLM starts run in it."""

    def __init__(self) -> None:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        super().__init__(target=_work, args=(theirs,), name="EngineCore")
        super().start()
        theirs.close()
        # Only now, since a started process gets a copy of what is here, and with it our end of the pipe.
        self._ours = ours
        self._job: tuple[Callable[..., None], dict[str, Any]] | None = None
        self._imported_with = _read_by_imports(os.environ)

    def start(self) -> None:
        """Hand over the job that vLLM has for its process."""
        assert self._job is not None, "vLLM makes a process before it starts it"
        self._ours.send_bytes(ForkingPickler.dumps((dict(os.environ), self.name, *self._job)))
        self._ours.close()

    @contextlib.contextmanager
    def vllm_uses(self) -> Iterator[None]:
        """While this is open, vLLM's first engine process is this one. Unused afterwards, it ends."""
        utils: Any = importlib.import_module("vllm.v1.engine.utils")
        get_context = utils.get_mp_context
        utils.get_mp_context = lambda: _Context(get_context(), self)
        try:
            yield
        finally:
            utils.get_mp_context = get_context
            if self._job is None:
                self.discard()

    def take(self, target: Callable[..., None], name: str, kwargs: dict[str, Any]) -> bool:
        """Whether this process will run `target`: it is free, alive, and its environment has not changed."""
        if self._job is not None or not self.is_alive() or self._imported_with != _read_by_imports(os.environ):
            return False
        self._job, self.name = (target, kwargs), name
        return True

    def discard(self) -> None:
        """End the process, which has no job."""
        self._ours.close()
        self.kill()
        self.join()


class _Context:
    """vLLM's multiprocessing context, whose first process is one that is there already."""

    def __init__(self, context: SpawnContext, early: EarlyEngine) -> None:
        self._context = context
        self._early = early

    def Process(self, target: Callable[..., None], name: str, kwargs: dict[str, Any]) -> Any:
        if self._early.take(target, name, kwargs):
            return self._early
        return self._context.Process(target=target, name=name, kwargs=kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _work(jobs: Connection) -> None:
    """The process: import, wait for the job, do it. Without a job it ends together with the one that would give it."""
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError:
            # The router imports the same, and reports it.
            logger.exception("%s cannot be imported", module)
            return
    try:
        environment, name, target, kwargs = ForkingPickler.loads(jobs.recv_bytes())
    except EOFError:
        return
    jobs.close()
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.current_process().name = name
    target(**kwargs)


def _read_by_imports(environment: Mapping[str, str]) -> list[str | None]:
    return [environment.get(name) for name in READ_BY_IMPORTS]
