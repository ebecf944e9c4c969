"""Which requests end with those that lack experts, over a made-up scheduler: vLLM's own runs in test_refused_requests.

Blocks hold four tokens each. With asynchronous scheduling, requests are preempted and aborted while a step is out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.v1.core.sched.scheduler", reason="vLLM's scheduler")

from vllm.v1.request import RequestStatus

from experts.vllm_plugin.engine_kwargs import EXPERTS_UNAVAILABLE, REFUSED, TRACES
from experts.vllm_plugin.scheduler import RefusalsMixin, TracesMixin

NULL = 0


class Scheduled:
    """What of vLLM's scheduler the mixin stands on."""

    def __init__(self, **blocks: list[int]) -> None:
        self.block_size = 4
        self.blocks = {name: (held,) for name, held in blocks.items()}
        self.requests = {name: request(name) for name in blocks}
        self.running = list(self.requests.values())
        self.evicted: set[int] = set()
        self.let_out: list[str] = []
        self.kv_cache_manager = SimpleNamespace(
            get_block_ids=lambda name: self.blocks.get(name, ([],)),
            evict_blocks=self.evicted.update,
            block_pool=SimpleNamespace(null_block=SimpleNamespace(block_id=NULL)),
        )

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        self.let_out = [name for name in scheduler_output.num_scheduled_tokens if name in self.requests]
        return {}

    def finish_requests(self, names: set[str], status: Any) -> list[Any]:
        ended = [self.requests[name] for name in sorted(names) if name in self.requests]
        for one in ended:
            one.status = status
            self._free_request_blocks(one)
            self.running = [other for other in self.running if other is not one]
            del self.requests[one.request_id]
        return ended

    def preempt(self, name: str) -> None:
        self._free_request_blocks(self.requests[name])
        self.requests[name].status = RequestStatus.PREEMPTED
        self.running = [other for other in self.running if other.request_id != name]

    def _free_request_blocks(self, one: Any) -> None:
        self.blocks.pop(one.request_id, None)


class Scheduler(RefusalsMixin, Scheduled):  # type: ignore[misc]
    pass


def request(name: str) -> Any:
    return SimpleNamespace(
        request_id=name,
        client_index=0,
        num_in_flight_tokens=1,
        status=RequestStatus.RUNNING,
        trace_headers=None,
        pooling_params=None,
        take_events=lambda: None,
        get_finished_reason=lambda: 3,
    )


def update(scheduler: Scheduler, refused: list[str], **computed: int) -> list[str]:
    """Take a step's output; the requests that end. `computed` are the tokens of each request before that step."""
    names = list(computed)
    cached = SimpleNamespace(req_ids=names[:1], num_computed_tokens=[computed[name] for name in names[:1]])
    new = [SimpleNamespace(req_id=name, num_computed_tokens=computed[name]) for name in names[1:]]
    step = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(names, 1), scheduled_cached_reqs=cached, scheduled_new_reqs=new
    )
    found = scheduler.update_from_output(step, SimpleNamespace(**({REFUSED: refused} if refused else {})))
    outputs = found[0].outputs if found else []
    assert all((one.stop_reason, one.new_token_ids) == (EXPERTS_UNAVAILABLE, []) for one in outputs)
    return [one.request_id for one in outputs]


def test_a_step_without_refusals_ends_nothing() -> None:
    scheduler = Scheduler(a=[1, 2], b=[3])
    assert update(scheduler, [], a=5, b=0) == []
    assert (scheduler.let_out, scheduler.evicted) == (["a", "b"], set())


def test_a_request_that_pools_ends_with_an_empty_answer() -> None:
    """vLLM's front end takes none without a tensor for an engine that pools."""
    scheduler = Scheduler(a=[1], b=[2])
    scheduler.requests["a"].pooling_params = object()
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 1, "b": 1},
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        scheduled_new_reqs=[],
    )
    found = scheduler.update_from_output(step, SimpleNamespace(**{REFUSED: ["a", "b"]}))[0].outputs
    pooled = {one.request_id: one.pooling_output for one in found}
    assert pooled["b"] is None
    assert pooled["a"].numel() == 0


def test_what_was_written_before_the_step_is_kept() -> None:
    """b shares the first block of a, which was full before; c shares nothing but the null block."""
    scheduler = Scheduler(a=[1, NULL, 2], b=[1, 3], c=[NULL, 4])
    assert update(scheduler, ["a"], a=5, b=4, c=6) == ["a"]
    assert scheduler.let_out == ["b", "c"]
    assert scheduler.evicted == {2}


def test_requests_that_read_what_was_written_end_too_and_so_on() -> None:
    """c shares no block with a, but one with b, which does."""
    scheduler = Scheduler(a=[1, 2], b=[1, 2, 3], c=[9, 3], d=[1, 5])
    assert update(scheduler, ["a"], a=4, b=8, c=4, d=4) == ["a", "b", "c"]
    assert scheduler.let_out == ["d"]
    assert scheduler.evicted == {2, 3}


def test_what_a_request_wrote_that_was_preempted_meanwhile_goes_as_well() -> None:
    scheduler = Scheduler(a=[1, 2], b=[7, 2], c=[8])
    scheduler.preempt("a")
    assert update(scheduler, ["a"], a=4, b=4, c=0) == ["a", "b"]
    assert scheduler.let_out == ["c"]
    assert {2} <= scheduler.evicted
    assert 8 not in scheduler.evicted


def test_one_that_was_preempted_meanwhile_may_have_read_it() -> None:
    scheduler = Scheduler(a=[1, 2], b=[2, 3], c=[8])
    scheduler.preempt("b")
    assert update(scheduler, ["a"], a=4, b=4, c=0) == ["a", "b"]
    assert scheduler.let_out == ["c"]
    assert {2, 3} <= scheduler.evicted


def test_what_an_aborted_request_wrote_is_not_found_again() -> None:
    scheduler = Scheduler(a=[1, 2], b=[2, 3], c=[8])
    scheduler.finish_requests({"a"}, RequestStatus.FINISHED_ABORTED)
    assert update(scheduler, ["a"], a=4, b=4, c=0) == ["b"]
    assert {2, 3} <= scheduler.evicted


def test_one_that_is_preempted_and_then_aborted_is_not_forgotten() -> None:
    scheduler = Scheduler(a=[1, 2], b=[2, 3], c=[8])
    scheduler.preempt("a")
    scheduler.finish_requests({"a"}, RequestStatus.FINISHED_ABORTED)
    assert update(scheduler, ["a"], a=4, b=4, c=0) == ["b"]
    assert {2, 3} <= scheduler.evicted


def test_blocks_given_up_before_an_earlier_step_are_forgotten() -> None:
    scheduler = Scheduler(a=[1, 2], b=[2, 3])
    scheduler.finish_requests({"a"}, RequestStatus.FINISHED_ABORTED)
    assert update(scheduler, [], b=4) == []
    scheduler.requests["c"] = request("c")
    scheduler.running.append(scheduler.requests["c"])
    scheduler.blocks["c"] = ([5],)
    assert update(scheduler, ["c"], c=0) == ["c"]
    assert scheduler.evicted == {5}


class Steps:
    """A scheduler whose steps hold what a test says."""

    def __init__(self, **headers: dict[str, str] | None) -> None:
        self.requests = {name: SimpleNamespace(trace_headers=each) for name, each in headers.items()}
        self.next: list[str] = []

    def schedule(self, throttle_prefills: bool = False) -> Any:
        return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(self.next, 1))


class TracedSteps(TracesMixin, Steps):  # type: ignore[misc]
    def traced(self, *names: str) -> list[str] | None:
        """The requests that the next step, of these, says are traced; None for a step that is not."""
        self.next = list(names)
        found = getattr(self.schedule(), TRACES, None)
        return None if found is None else list(found)


SAMPLED = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
UNSAMPLED = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02"}


def test_one_step_in_so_many_is_traced_and_the_first_after_others() -> None:
    steps = TracedSteps(a=SAMPLED, b=SAMPLED, plain=None, off=UNSAMPLED)
    steps.trace_every = 3
    assert steps.traced("plain") is None
    assert [steps.traced("a", "plain") for _ in range(7)] == [["a"], None, None, ["a"], None, None, ["a"]]
    assert steps.traced("a", "b") is None, "others join without adding steps"
    assert steps.traced("plain", "off") is None
    assert steps.traced("b", "a", "gone") == ["b", "a"]


@pytest.mark.parametrize(
    "headers", [None, {}, UNSAMPLED, {"tracestate": "a=b"}, {"traceparent": "x"}, {"traceparent": "00-a-b-zz"}]
)
def test_requests_that_are_not_sampled_trace_nothing(headers: dict[str, str] | None) -> None:
    assert TracedSteps(a=headers).traced("a") is None


def test_a_traced_step_bears_the_headers() -> None:
    steps = TracedSteps(a=SAMPLED)
    steps.next = ["a"]
    assert getattr(steps.schedule(), TRACES) == {"a": SAMPLED}
