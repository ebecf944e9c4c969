"""When a router counts as healthy, over a worker that is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cluster.http.health import GenerationHealth
from cluster.router import health
from cluster.router.health import MAX_MISSED_READINGS, RouterHealth
from cluster.router.worker_calls import EngineSilentError
from experts.protocol.status import RouterStatus
from tests.support.serve.statuses import router_status
from tests.support.waiting import run_async

FRESH = router_status(last_success_age_s=0.5)
STALE = router_status(last_success_age_s=60.0)


class Worker:
    """Gives `status`; is silent while that is None."""

    timeout_s = 0.25

    def __init__(self, status: RouterStatus | None = FRESH) -> None:
        self.reading: RouterStatus | None = status
        self.calls = 0
        self.on_call: Callable[[int], Any] = lambda calls: None

    async def status(self) -> RouterStatus:
        self.calls += 1
        self.on_call(self.calls)
        await asyncio.sleep(0)
        if self.reading is None:
            raise EngineSilentError("no answer")
        return self.reading


def make(worker: Worker, generate: Any = None, on_reading: Callable[[RouterStatus], None] = lambda status: None) -> Any:
    async def never() -> None:
        raise AssertionError("nothing is generated")

    return RouterHealth("r1", worker, generate or never, on_reading)  # type: ignore[arg-type]


def run(coroutine: Any) -> Any:
    return run_async(asyncio.wait_for(coroutine, 30))


def test_any_number_of_callers_at_one_time_cost_the_engine_one_reading() -> None:
    """/metrics and the status are asked for without limit, and each reading comes between two steps."""

    async def check() -> None:
        worker = Worker()
        subject = make(worker)
        assert await asyncio.gather(*(subject.shared_reading() for _ in range(50))) == [FRESH] * 50
        assert worker.calls == 1
        worker.reading = STALE
        assert await subject.shared_reading() == STALE, "an answer is not kept for later"

    run(check())


def test_a_caller_that_hangs_up_takes_no_reading_from_the_others() -> None:
    async def check() -> None:
        subject = make(Worker())
        one, other = (asyncio.create_task(subject.shared_reading()) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert await other == FRESH

    run(check())


def test_a_router_whose_engine_stays_silent_is_unhealthy_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WATCH_S", 0.0)

    async def check() -> None:
        worker, exported, missed = Worker(None), asyncio.Event(), asyncio.Event()
        noted: list[RouterStatus] = []
        subject = make(worker, on_reading=noted.append)

        def on_call(calls: int) -> None:
            if calls <= MAX_MISSED_READINGS:
                subject.check()
            elif calls == MAX_MISSED_READINGS + 1:
                missed.set()

        worker.on_call = on_call
        watch = asyncio.create_task(subject.watch(lambda status: exported.set()))
        try:
            await missed.wait()
            with pytest.raises(
                EngineSilentError, match=r"answered none of [34] readings of its counters, 0\.25 s each"
            ):
                subject.check()
            worker.reading = STALE
            await exported.wait()
            subject.check()
            assert noted[0] == STALE
        finally:
            watch.cancel()

    run(check())


def test_what_fails_to_be_exported_ends_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WATCH_S", 0.0)

    async def check() -> None:
        exported: list[RouterStatus] = []
        again = asyncio.Event()

        def export(status: RouterStatus) -> None:
            exported.append(status)
            if len(exported) == 1:
                raise KeyError("metric")
            again.set()

        watch = asyncio.create_task(make(Worker()).watch(export))
        await again.wait()
        assert not watch.done()
        watch.cancel()

    run(check())


def test_a_recent_answer_of_a_shard_is_health_enough() -> None:
    found = run(make(Worker()).generation_health(within_s=1.0, timeout_s=5.0))
    assert found == GenerationHealth(True, "r1", "", "recent token", epoch=4, connected=[1], lost={0: "gone"})


@pytest.mark.parametrize(
    ("before", "after", "ok"),
    [
        (STALE, FRESH, True),
        (router_status(last_success_age_s=None), FRESH, True),
        (STALE, STALE, False),  # the router computed the token itself
        (router_status(connected=[]), router_status(connected=[]), False),
    ],
)
def test_without_one_a_token_is_generated(before: RouterStatus, after: RouterStatus, ok: bool) -> None:
    worker = Worker(before)

    async def generate() -> None:
        worker.reading = after

    found = run(make(worker, generate).generation_health(within_s=1.0, timeout_s=5.0))
    reason = "" if ok else "no shard answered; lost: {0: 'gone'}"
    assert found == GenerationHealth(ok, "r1", reason, "probe", 4, after.connected, {0: "gone"})


def test_a_probe_that_fails_or_hangs_says_so() -> None:
    async def fails() -> None:
        raise RuntimeError("out of blocks")

    async def hangs() -> None:
        await asyncio.Event().wait()

    found = run(make(Worker(STALE), fails).generation_health(within_s=1.0, timeout_s=5.0))
    assert found == GenerationHealth(False, "r1", "RuntimeError: out of blocks", "probe")
    found = run(make(Worker(STALE), hangs).generation_health(within_s=1.0, timeout_s=0.05))
    assert found == GenerationHealth(False, "r1", "the engine gave no answer within 0.05 s", "probe")
    assert list(found.to_dict()) == ["ok", "router_id", "reason", "how"], "what is not known is not shown"


def test_probes_at_one_time_share_a_token() -> None:
    worker, tokens = Worker(STALE), []

    async def generate() -> None:
        tokens.append(1)
        await asyncio.sleep(0)
        worker.reading = FRESH

    async def check() -> None:
        subject = make(worker, generate)
        found = await asyncio.gather(*(subject.generation_health(within_s=1.0, timeout_s=5.0) for _ in range(8)))
        assert all(answer.ok for answer in found)
        assert len(tokens) == 1

    run(check())
