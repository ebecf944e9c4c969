"""vLLM's scheduler that ends the requests which a step computed without all of their experts, and names traced ones.

Everything here touches vLLM's internals (0.32); `tests/experts/vllm_plugin/test_joints.py` says what a later version
moved. The worker names the requests in the step's output (`joints.report_refused`). They end before a token of the step
is looked at, and with them every request that shares a block of KV cache written in that step: vLLM lets a block be
found by its prefix from the moment it is scheduled, so a second request may have read it before this is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from experts.vllm_plugin.engine_kwargs import EXPERTS_UNAVAILABLE, REFUSED, TRACES
from experts.vllm_plugin.parent_watch import end_with_parent

# The answer of an engine that pools to a prompt that lacked experts: vLLM's front end needs some tensor.
NOTHING_POOLED = torch.empty(0)


def scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would have chosen, which also ends refused requests. What `scheduler_cls` names."""
    end_with_parent()  # where the workers are processes of their own, this one imports nothing else of the project
    config = kwargs["vllm_config"]
    tracing = (config.additional_config.get("expertmesh") or {}).get("tracing")
    if config.scheduler_config.async_scheduling:
        made = (_AsyncTracedScheduler if tracing else _AsyncMeshScheduler)(*args, **kwargs)
    else:
        made = (_TracedScheduler if tracing else _MeshScheduler)(*args, **kwargs)
    if tracing:
        made.trace_every = int(tracing["step_interval"])  # type: ignore[union-attr]
    return made


class RefusalsMixin:
    """What the project adds to either scheduler."""

    requests: dict[str, Request]
    running: list[Request]
    kv_cache_manager: Any
    block_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Blocks of requests that were preempted or aborted while a step of theirs was out, by request id.
        self._given_up: dict[str, list[int]] = {}

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, after the refused requests are ended with an error."""
        refused = getattr(model_runner_output, REFUSED, None)
        ended = self._end(scheduler_output, refused) if refused else []
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        self._given_up.clear()
        for request in ended:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    pooling_output=None if request.pooling_params is None else NOTHING_POOLED,
                    finish_reason=request.get_finished_reason(),
                    stop_reason=EXPERTS_UNAVAILABLE,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def _free_request_blocks(self, request: Request) -> None:
        if request.num_in_flight_tokens:
            self._given_up.setdefault(request.request_id, []).extend(self._blocks_of(request.request_id))
        super()._free_request_blocks(request)  # type: ignore[misc]

    def _end(self, scheduler_output: SchedulerOutput, refused: list[str]) -> list[Request]:
        ids, blocks = self._poisoned(scheduler_output, refused)
        self.kv_cache_manager.evict_blocks(blocks)
        return self.finish_requests(ids, RequestStatus.FINISHED_ERROR)  # type: ignore[attr-defined,no-any-return]

    def _poisoned(self, scheduler_output: SchedulerOutput, refused: list[str]) -> tuple[set[str], set[int]]:
        """All requests that hold what refused rows wrote, and the blocks of that."""
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        ids, blocks = set(refused), set[int]()
        for request_id in refused:
            blocks |= self._blocks_from(request_id, computed.get(request_id, 0) // self.block_size)
        found = True
        while found:
            found = False
            for request_id in {request.request_id for request in self.running} - ids:
                mine = self._blocks_of(request_id)
                if not blocks.isdisjoint(mine):
                    ids.add(request_id)
                    # What it wrote in this step follows from what it read.
                    blocks |= self._blocks_from(request_id, computed.get(request_id, 0) // self.block_size)
                    found = True
        # One that was preempted since has no blocks any more to tell by: it may have read them.
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and request.status == RequestStatus.PREEMPTED:
                ids.add(request_id)
                blocks |= self._blocks_from(request_id, computed.get(request_id, 0) // self.block_size)
        return ids, blocks

    def _blocks_from(self, request_id: str, first: int) -> set[int]:
        """A request's blocks from index `first` on, in every group of the cache."""
        groups = self.kv_cache_manager.get_block_ids(request_id) if request_id in self.requests else ()
        blocks = {block for group in groups for block in group[first:]}
        # Those that were given up are not kept in groups; all of them go.
        return (blocks | set(self._given_up.get(request_id, ()))) - {
            self.kv_cache_manager.block_pool.null_block.block_id
        }

    def _blocks_of(self, request_id: str) -> list[int]:
        return [block for group in self.kv_cache_manager.get_block_ids(request_id) for block in group]


class TracesMixin:
    """What it adds for routers that trace: steps say which of their requests are traced, for the worker to note times.

    One step in `trace_every` of those with a request whose trace is sampled, and the first of them after steps
    without one.
    """

    requests: dict[str, Request]
    trace_every = 1
    _untraced = 0  # steps since the last one that was traced
    _idle = True  # no request of the step before is traced

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's; the output bears the W3C headers of traced requests, by id, if this step is traced."""
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        traces = {}
        for request_id in output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and request.trace_headers and _is_sampled(request.trace_headers):
                traces[request_id] = dict(request.trace_headers)
        if traces:
            self._untraced += 1
            if self._idle or self._untraced >= self.trace_every:
                self._untraced = 0
                setattr(output, TRACES, traces)
        self._idle = not traces
        return output


def _is_sampled(headers: Mapping[str, str]) -> bool:
    """Whether the last flag of a traceparent (00-TRACE-SPAN-FLAGS) is set; OpenTelemetry judges the rest."""
    try:
        return bool(int(headers.get("traceparent", "").split("-")[3], 16) & 1)
    except (IndexError, ValueError):
        return False


class _MeshScheduler(RefusalsMixin, Scheduler):
    pass


class _TracedScheduler(TracesMixin, _MeshScheduler):
    pass


class _AsyncMeshScheduler(RefusalsMixin, AsyncScheduler):
    pass


class _AsyncTracedScheduler(TracesMixin, _AsyncMeshScheduler):
    pass
