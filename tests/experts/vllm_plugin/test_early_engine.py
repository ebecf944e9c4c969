"""The process that waits for an engine: it takes vLLM's job as vLLM's own would, or steps aside."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from experts.vllm_plugin import early_engine
from experts.vllm_plugin.early_engine import EarlyEngine
from tests.support.waiting import wait_for

pytest.importorskip("vllm", reason="the process is for vLLM's engine")
TIMEOUT_S = 120


def report(pipe: Connection, variable: str) -> None:
    """A job: who runs it, and what its environment says."""
    import multiprocessing

    pipe.send((os.getpid(), multiprocessing.current_process().name, os.environ.get(variable)))


@pytest.fixture
def engine() -> Iterator[EarlyEngine]:
    process = EarlyEngine()
    yield process
    process.kill()
    process.join(TIMEOUT_S)


def start_as_vllm(variable: str = "X") -> tuple[Any, Any]:
    """(the process, what it reports), started the way vLLM starts its engine."""
    from vllm.v1.engine import utils

    context = utils.get_mp_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=report, name="EngineCore_DP0", kwargs={"pipe": theirs, "variable": variable})
    process.start()
    assert ours.poll(TIMEOUT_S), "the job reports nothing"
    return process, ours.recv()


def test_the_first_engine_runs_in_it_and_the_next_in_one_of_its_own(
    engine: EarlyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with engine.vllm_uses():
        monkeypatch.setenv("EXPERTMESH_SET_LATE", "1")
        process, told = start_as_vllm("EXPERTMESH_SET_LATE")
        assert process is engine
        assert told == (engine.pid, "EngineCore_DP0", "1")
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
        second, told = start_as_vllm()
        assert told[0] == second.pid != engine.pid
        second.join(TIMEOUT_S)


def test_a_process_that_imported_for_another_device_steps_aside(
    engine: EarlyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with engine.vllm_uses():
        process, told = start_as_vllm()
        assert told[0] == process.pid != engine.pid
        process.join(TIMEOUT_S)
    assert not engine.is_alive(), "it waits for no job that will come"


def test_it_ends_with_the_one_that_would_give_it_a_job(engine: EarlyEngine) -> None:
    engine._ours.close()
    wait_for(lambda: not engine.is_alive(), TIMEOUT_S, "the end of a process without a job")


def test_vllm_starts_its_engine_where_it_is_taken_over() -> None:
    from vllm.v1.engine import utils

    source = inspect.getsource(utils.CoreEngineProcManager.__init__)
    assert "context = get_mp_context()" in source
    assert "context.Process(" in source
    assert set(early_engine.MODULES) >= {"vllm.v1.engine.core"}
