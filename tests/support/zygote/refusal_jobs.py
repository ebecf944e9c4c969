"""What a router's engine does with requests whose experts are nowhere; facts go back as JSON to the tests."""

from __future__ import annotations

import io
import os
import signal
from typing import Any

from tests.support.zygote.parity_jobs import TWO_WORKERS, fork_workers

NEW_TOKENS = 6
BLOCK = 32
SHARED = list(range(3, 3 + BLOCK))  # a block of the KV cache
# The second finds the first's block by its prefix, even in the step that computes them.
PROMPTS = [[*SHARED, 200], [*SHARED, 90], [7], [101], [55, 56], [9]]


def refusals_of_requests(emit: Any, model: str, membership: dict[str, Any], victim: int, workers: int) -> None:
    """Each prompt alone; then all at once while experts are nowhere, with no time to compute them and with enough.

    Of several workers, all but the last have time from the start, so that what is refused is refused by that one.
    """
    from vllm import LLM

    from experts.protocol.membership import Membership
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    parallel = TWO_WORKERS if workers == 2 else {}
    fork_workers()
    settings = RouterSettings(
        model_path=model, trace_tokens=1000, membership_by_rpc=True, fallback_max_ms_per_step=0, router_id="r1"
    )
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        block_size=BLOCK,
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
        **router_engine_kwargs(settings, dict(parallel)),
    )
    engine.collective_rpc(take_time)

    def call(name: str, *arguments: Any) -> Any:
        return engine.collective_rpc(name, args=arguments)[0]

    use_without(engine, membership, 1, set())
    alone, pairs = [], []
    for prompt in PROMPTS:
        call("expertmesh_clear_trace")
        alone.append(_all_at_once(engine, [prompt])[0])
        pairs.append(pairs_by_token(call("expertmesh_trace")))
    lost = needed_by_prefix_alone(pairs, len(SHARED))
    emit(alone=alone, lost=sorted(lost), prefix_was_found=len(pairs[1]) == NEW_TOKENS)

    use_without(engine, membership, 2, lost)
    engine.reset_prefix_cache()
    emit(refused=_all_at_once(engine, PROMPTS), status_of_refused=call("expertmesh_status"))
    emit(refusing=engine.collective_rpc(_has_no_time))
    use_without(engine, membership, 3, set())
    emit(after=_all_at_once(engine, PROMPTS))  # nothing of what was computed without experts may be found again

    use_without(engine, membership, 4, lost)
    engine.reset_prefix_cache()
    engine.collective_rpc(give_time)
    emit(computed=_all_at_once(engine, PROMPTS), status_of_computed=call("expertmesh_status"))

    use_without(engine, membership, 5, set())
    engine.collective_rpc(_take_all_time)
    of_victim = _held_by(Membership.from_dict(membership).placement, rank=0)
    needs = [bool(of_victim & set().union(*one)) for one in pairs]
    engine.reset_prefix_cache()
    emit(
        killed=_all_at_once(engine, PROMPTS[2:], kill_after=2, victim=victim),
        needs=needs[2:],
        status_of_killed=call("expertmesh_status"),
    )
    emit(later=_all_at_once(engine, PROMPTS[2:]), done=True)


def _all_at_once(engine: Any, prompts: list[list[int]], kill_after: int = -1, victim: int = 0) -> list[Any]:
    """[token ids, finish reason, stop reason] of each prompt, greedily; `victim` is killed after so many steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=NEW_TOKENS)
    for index, ids in enumerate(prompts):
        engine.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, sampling)
    done: dict[int, Any] = {}
    step = 0
    while engine.llm_engine.has_unfinished_requests():
        if step == kill_after:
            os.kill(victim, signal.SIGKILL)
        step += 1
        for output in engine.llm_engine.step():
            if output.finished:
                [one] = output.outputs
                done[int(output.request_id.partition("-")[0])] = [
                    list(one.token_ids),
                    one.finish_reason,
                    one.stop_reason,
                ]
    return [done[index] for index in range(len(prompts))]


def pairs_by_token(trace: bytes) -> list[set[tuple[int, int]]]:
    """The (layer, expert) pairs of each token that a router computed, in order."""
    from placement.traces.trace import ActivationTrace

    ids_TLK = ActivationTrace.load_npz(io.BytesIO(trace)).topk_ids
    return [
        {(layer, int(expert)) for layer, ids_K in enumerate(ids_LK) for expert in ids_K} for ids_LK in ids_TLK.tolist()
    ]


def needed_by_prefix_alone(pairs: list[list[set[tuple[int, int]]]], length: int) -> set[tuple[int, int]]:
    """What the first prompt's first `length` tokens need and no other token does; `pairs` by prompt and token."""
    of_prefix = set().union(*pairs[0][:length])
    return of_prefix - set().union(*pairs[0][length:], *(pair for one in pairs[1:] for pair in one))


def use_without(engine: Any, membership: dict[str, Any], epoch: int, lost: set[tuple[int, int]]) -> None:
    """Have all workers use an epoch whose placement has no slot for the pairs `lost`."""
    from experts.protocol.membership import Membership

    whole = Membership.from_dict(membership)
    told = Membership(epoch, _without(whole.placement, lost), whole.endpoints).to_dict()
    applied = engine.collective_rpc("expertmesh_use_membership", args=(told,))
    assert [one["lost"] for one in applied] == [{}] * len(applied)


def _without(placement: Any, lost: set[tuple[int, int]]) -> Any:
    from placement.placement import Placement

    map_LS = placement.physical_to_logical_map.copy()
    for layer, expert in lost:
        map_LS[layer, map_LS[layer] == expert] = -1
    return Placement(placement.num_ranks, 1, placement.num_experts, map_LS, partial=True)


def _held_by(placement: Any, rank: int) -> set[tuple[int, int]]:
    held_Ls = placement.experts_of_rank(rank).tolist()
    return {(layer, expert) for layer, experts in enumerate(held_Ls) for expert in experts if expert >= 0}


def give_time(worker: Any) -> None:
    _set_time(600_000_000_000)


def take_time(worker: Any) -> None:
    _set_time(0 if _has_no_time(worker) else 600_000_000_000)


def _take_all_time(worker: Any) -> None:
    _set_time(0)


def _has_no_time(worker: Any) -> bool:
    """Whether this is the engine's last worker."""
    from experts.vllm_plugin.layer import current_client

    share = current_client().share
    return share is None or share.worker == share.num_workers - 1


def _set_time(nanoseconds: int) -> None:
    from experts.vllm_plugin.layer import current_client

    fallback = current_client().dispatcher.fallback
    assert fallback is not None
    fallback.max_ns_per_step = nanoseconds
