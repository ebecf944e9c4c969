"""The background process: prices against brute force, plans, and what becomes of jobs that fail."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from cluster.autopilot.background import Background, JobError, do
from cluster.autopilot.jobs import JudgeJob, Model, PlanJob, Prepared, PrepareJob, Proposal, Verdict
from cluster.autopilot.pricing import StepPrice, price_steps, recut
from cluster.autopilot.proposals import with_slots
from placement.capacity.residency import Offload
from placement.placement import Placement
from placement.rule.evaluate import dispatch_trace
from placement.traces.observation import Observation, SampledStep
from tests.support.waiting import run_async

MODEL = Model(1000, 2.0, 4000, "cpu")
PRICE = StepPrice(5.0, 1.0, 0.5)
EXPERTS, TOP_K = 12, 3


def steps(count: int, tokens: int, seed: int = 0, groups: bool = True) -> tuple[SampledStep, ...]:
    """Tokens that pick experts of one group of three: 0, 4, 8; 1, 5, 9; ... so that linear order scatters them."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = (rng.integers(4, size=(tokens, 2))[:, :, None] + 4 * np.arange(TOP_K)).astype(np.int16)
        found.append(SampledStep(number, float(number), tokens, ids, rng.random(tokens) < 0.5))
    return tuple(found)


def seen(sampled: tuple[SampledStep, ...]) -> Observation:
    ids_TLK = np.concatenate([step.topk_ids for step in sampled])
    counts_PLE = np.zeros((2, 2, EXPERTS), np.int64)
    for layer in range(2):
        counts_PLE[0, layer] = np.bincount(ids_TLK[:, layer].ravel(), minlength=EXPERTS)
    return Observation((0, 1), counts_PLE, np.array([len(ids_TLK), 0]), len(sampled), sampled)


LINEAR = Placement.linear(2, EXPERTS, 3, 1, 1)
LINEAR_1 = Placement.linear(1, 4, 2)


def test_prices_are_those_of_brute_force() -> None:
    sampled = (*steps(3, 7), replace(steps(1, 7, seed=9)[0], num_tokens=14))
    found = price_steps(LINEAR, sampled, PRICE)
    for number, step in enumerate(sampled):
        rank_LTK, scale = dispatch_trace(LINEAR, step.topk_ids), step.num_tokens / 7
        for layer in range(2):
            ids_TK, rank_TK = step.topk_ids[:, layer], rank_LTK[layer]
            worst = 0.0
            for rank in range(3):
                experts, pairs = set(ids_TK[rank_TK == rank].tolist()), int((rank_TK == rank).sum())
                rows = int((rank_TK == rank).any(1).sum())
                worst = max(worst, max(5.0 * len(experts), 1.0 * pairs * scale) + 0.5 * rows * scale)
            assert found.seconds_SL[number, layer] == pytest.approx(worst)
        fan_out = np.mean([[len(set(row)) for row in layer] for layer in rank_LTK.tolist()])
        assert found.fan_out_S[number] == pytest.approx(fan_out)


def test_a_layer_that_no_token_went_through_counts_in_no_mean() -> None:
    """As the layer of multi-token prediction, for routers that do not guess."""
    sampled = steps(3, 7)
    wider = [
        replace(step, topk_ids=np.concatenate([step.topk_ids, np.full((7, 1, TOP_K), -1, np.int16)], 1))
        for step in sampled
    ]
    whole, found = price_steps(LINEAR, sampled, PRICE), price_steps(Placement.linear(3, EXPERTS, 3, 1, 1), wider, PRICE)
    assert found.fan_out_S.tolist() == whole.fan_out_S.tolist()
    assert found.balancedness_S.tolist() == whole.balancedness_S.tolist()
    assert found.seconds_S.tolist() == whole.seconds_S.tolist()


def tokens(*ids: int) -> SampledStep:
    """A step of a layer, of tokens with one expert each."""
    return SampledStep(0, 0.0, len(ids), np.array(ids, np.int16).reshape(-1, 1, 1), np.zeros(len(ids), np.bool_))


def test_an_expert_out_of_memory_costs_its_copy() -> None:
    """Two shards, two experts each, one of them in memory: at first 0 and 2, which the steps use most."""
    sampled = [tokens(0, 2), tokens(0, 2), tokens(1, 2), tokens(0, 2)]
    placement = Placement.linear(1, 4, 2)
    price = replace(PRICE, offload=Offload(0.5, 10.0), expert_bytes=100)
    found, free = price_steps(placement, sampled, price), price_steps(placement, sampled, PRICE)
    assert (free.found_S, free.copy_S) == (None, None)
    assert found.found_S is not None
    assert found.copy_S is not None
    assert found.found_S.tolist() == [1, 1, 0.5, 0.5]
    assert found.copy_S.tolist() == [0, 0, 10, 10], "1 comes in place of 0, then 0 in place of 1"
    np.testing.assert_allclose(found.seconds_S, free.seconds_S + found.copy_S)
    early = price_steps(placement, sampled, replace(price, offload=Offload(0.5, 10.0, foreseen=0.75)))
    assert early.copy_S is not None
    assert early.copy_S.tolist() == [0, 0, 2.5, 2.5]


def test_hot_experts_on_one_shard_cost_more_where_it_has_room_for_one() -> None:
    """Steps of one token, for experts 0 and 1 by turns: all placements cost the same but for copies."""
    apart = replace(LINEAR_1, physical_to_logical_map=np.array([[0, 2, 1, 3]], np.int32))
    steps_of = tuple(replace(tokens(n % 2), number=n, at_s=float(n)) for n in range(20))
    counts_PLE = np.zeros((2, 1, 4), np.int64)
    counts_PLE[0, 0, :2] = 10
    traffic = Observation((0,), counts_PLE, np.array([20, 0]), 20, steps_of)
    for offload, more in ((None, False), (Offload(0.5, 1e6), True)):
        verdict = do(JudgeJob(replace(MODEL, offload=offload), (LINEAR_1, apart), traffic))
        assert isinstance(verdict, Verdict)
        together, separate = verdict.prices
        assert (together.mean() > separate.mean()) == more
        if more:
            assert together.mean() - separate.mean() == pytest.approx(1000 / 1e6 * 19 / 20)


def test_recut_steps_have_the_sizes_asked_for_and_tokens_of_the_reference() -> None:
    reference, like = steps(4, 5), steps(3, 8, seed=5)
    known = {row.tobytes() for step in reference for row in step.topk_ids}
    for cut, wanted in zip(recut(reference, like), like, strict=True):
        assert (len(cut.topk_ids), cut.prefill_T.sum()) == (8, wanted.prefill_T.sum())
        assert {row.tobytes() for row in cut.topk_ids} <= known


def job(**changes: object) -> PlanJob:
    plan = PlanJob(MODEL, LINEAR, seen(steps(48, 32)), 4, 1, 1.3, 1e-9, 1e6, None, 0.0)
    return replace(plan, **changes)  # type: ignore[arg-type]


def test_a_plan_gathers_what_goes_together_and_stays_once_it_has() -> None:
    found = do(job())
    assert isinstance(found, Proposal)
    assert found.copies
    assert found.gain.surely_above > 0.05
    again = do(job(current=found.placement, seen=seen(steps(48, 32, seed=1))))
    assert isinstance(again, Proposal)
    assert again.copies <= 2


def test_copies_are_bounded_and_must_pay() -> None:
    assert do(job(max_copies=0)).copies == 0  # type: ignore[union-attr]
    assert do(job(copy_s=1e9)).copies == 0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="3 steps were sampled, a plan needs 12"):
        do(job(seen=seen(steps(3, 32))))


def test_slots_are_added_and_taken_without_moving_anything() -> None:
    wide = with_slots(LINEAR, 6)
    assert wide.slots_per_rank == 6
    np.testing.assert_array_equal(with_slots(wide, 1).physical_to_logical_map, LINEAR.physical_to_logical_map)


def test_once_prepared_no_job_compiles_anything() -> None:
    assert do(PrepareJob()) == Prepared()
    before = compiled_signatures()
    assert {name.partition(".")[0] for name in before} >= {"cluster", "placement"}
    plan = job(fresh_s=1.0)
    assert isinstance(do(plan), Proposal)
    assert isinstance(do(JudgeJob(MODEL, (LINEAR,), plan.seen, plan.seen)), Verdict)
    assert compiled_signatures() == before


def compiled_signatures() -> dict[str, int]:
    """How often each function of these packages was compiled, or loaded, in this process."""
    return {
        f"{function.__module__}.{function.__name__}": len(function.signatures)
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in ("cluster", "placement")
        for function in vars(module).values()
        if isinstance(function, Dispatcher) and function.signatures
    }


def test_a_process_does_jobs_tells_what_failed_and_is_replaced() -> None:
    judge = JudgeJob(MODEL, (LINEAR,), seen(steps(4, 6)), seen(steps(4, 6, seed=1)))

    async def scene() -> None:
        background = Background()
        try:
            first = await background.run(judge, 300)
            assert isinstance(first, Verdict)
            np.testing.assert_array_equal(first.prices[0].seconds_SL, do(judge).prices[0].seconds_SL)  # type: ignore[union-attr]
            with pytest.raises(JobError, match="ValueError: 4 steps were sampled"):
                await background.run(job(seen=judge.seen), 300)
            process = background.process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            assert isinstance(await background.run(judge, 300), Verdict)
            with pytest.raises(JobError, match=r"no result within 0\.001 s"):
                await background.run(judge, 0.001)
            assert background.process is None
        finally:
            await background.stop()

    run_async(scene(), timeout_s=300)
