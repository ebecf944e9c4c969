"""For every test: a secret for its meshes, and no process that a test started outlives the suite. For two processes
that share the suite (`make test`): which runs what.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experts.protocol.secret import share_by_environment

share_by_environment()

with contextlib.suppress(ImportError):  # tests/run_gpu.py does without it
    from hypothesis import settings

    settings.register_profile("suite", deadline=None)  # of a busy machine, a single slow call says nothing
    settings.load_profile("suite")

# Children inherit it through any chain of parents, so that orphans are found too.
_MARK_NAME = "EXPERTMESH_TEST_SESSION"
_MARK = f"{_MARK_NAME}={secrets.token_hex(8)}"
os.environ[_MARK_NAME] = _MARK.partition("=")[2]

# Python's own helpers: they end with the process they serve.
_EXPECTED = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def _marked_processes() -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process that a test of this session started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if _MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if int(folder.name) != os.getpid() and command:
                    yield int(folder.name), command
        except OSError:  # it has ended, or belongs to another user
            continue


# One process runs all of them: two services at a time slow each other down, and some tests look for a service's
# processes by the names that all services give them. They take half of the suite's time, so they begin first.
_SERVICES = ("tests/system/serve/", "tests/system/variants/", "tests/system/hosts/")


@pytest.hookimpl(optionalhook=True)  # tests/run_gpu.py runs without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs a file from start to end, for its fixtures' sake, and one all that starts a service."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "services" if nodeid.startswith(_SERVICES) else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order tests for `pytest_xdist_make_scheduler`, and check that those for a GPU can be found.

    tests/run_gpu.py searches files for the mark `gpu`, since importing them needs packages that may be missing.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(_SERVICES))
    files = {item.path for item in items if item.get_closest_marker("gpu") is not None}
    hidden = [str(path) for path in files if "pytest.mark.gpu" not in path.read_text()]
    if hidden:
        raise pytest.UsageError(f"name pytest.mark.gpu in the files whose tests have it: {', '.join(sorted(hidden))}")
    for item in items:
        if "triton_device" in getattr(item, "fixturenames", ()) and item.get_closest_marker("triton") is None:
            raise pytest.UsageError(
                f"{item.nodeid} needs triton_device: mark it triton, or 'make test-triton' skips it"
            )


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Undo what code under test does to logging for good, so that no test depends on those before it.

    A replica's code sends the log of `experts` where Serve's goes. vLLM's HTTP app imports
    model_hosting_container_standards, which lifts the root logger's level to ERROR on import.
    """
    logging.getLogger().setLevel(logging.WARNING)
    ours = logging.getLogger("experts")
    level, handlers = ours.level, list(ours.handlers)
    yield
    ours.setLevel(level)
    ours.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def _reap() -> Iterator[None]:
    """Kill the processes that tests left behind, and name them."""
    yield
    for pid, command in list(_marked_processes()):
        if not any(name in command for name in _EXPECTED):
            print(f"\nleft behind by a test and killed now: process {pid}: {command[:200]}")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
