"""Layouts keep what they promise, and heavier questions never need fewer GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.checkpoint.sizes.known_models import known_models
from experts.protocol.wire import reply_capacity, request_capacity
from placement.placement import Placement
from placement.sizing.demand import Demand
from placement.sizing.errors import NoLayoutError, SizingError
from placement.sizing.expert_times import Half
from placement.sizing.gpus import gpu_named, gpus
from placement.sizing.memory import ROWS_PER_DISPATCH, pair_bytes, router_memory
from placement.sizing.model import ModelFacts
from placement.sizing.plan import Layout, best_layouts, plan_engines, plan_layout, slots_of
from placement.sizing.sizing import Sizing, shares, size
from placement.sizing.speed import Roofline

H100, H200 = gpu_named("h100"), gpu_named("H200")
CHAT = Demand(isl=500, osl=200, rate=5, tpot_ms=50, ttft_ms=1000, max_gpus=64)


def known(name: str) -> ModelFacts:
    return known_models()[name].facts()


MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "olmoe-1b-7b")


def fewest(name: str, demand: Demand) -> float:
    facts = replace(known(name), max_positions=None)
    try:
        return plan_layout(facts, H100, demand).gpus
    except NoLayoutError:
        return float("inf")


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    return Demand(
        isl=draw(st.integers(1, 3000)),
        osl=draw(st.integers(1, 900)),
        rate=draw(st.floats(0.01, 60)),
        tpot_ms=draw(st.floats(8, 200)),
        ttft_ms=draw(st.floats(50, 5000)),
        headroom=draw(st.floats(0, 0.5)),
        spare_slots=draw(st.integers(0, 2)),
        lost_shards=draw(st.integers(0, 2)),
        max_gpus=64,
        router_gpus=draw(st.sampled_from((1, 2, 4))),
    )


@settings(max_examples=12)
@given(st.sampled_from(MODELS), demands())
def test_a_layout_keeps_every_promise(name: str, demand: Demand) -> None:
    facts = replace(known(name), max_positions=None)
    try:
        best = plan_layout(facts, H100, demand)
    except NoLayoutError:
        return
    assert best.gpus == best.services * (best.routers * best.router_gpus + best.shards) <= demand.max_gpus
    assert best.point.tpot_s * 1e3 <= demand.tpot_ms
    assert best.point.ttft_s * 1e3 <= demand.ttft_ms
    for memory in (best.router, best.shard):
        assert memory.nbytes <= (1 - demand.headroom) * H100.memory_bytes * (1 + 1e-9)
    if demand.lost_shards:
        assert best.degraded_tpot_s is not None
        assert best.degraded_tpot_s * 1e3 <= demand.tpot_ms * (1 + 1e-3)
    assert (best.shards - demand.lost_shards) * best.slots >= facts.num_experts, "survivors hold every expert"
    Placement.linear(1, facts.num_experts, best.shards, min_replicas=best.replicas)
    assert best.slots >= -(-facts.num_experts * best.replicas // best.shards) + demand.spare_slots
    assert sum(shares(best.point.step).values()) == pytest.approx(1)


HARDER = {
    "rate": lambda value, more: value * more,
    "isl": lambda value, more: int(value * more) + 1,
    "osl": lambda value, more: int(value * more) + 1,
    "headroom": lambda value, more: min(0.9, value + (more - 1) / 10),
    "tpot_ms": lambda value, more: value / more,
    "ttft_ms": lambda value, more: value / more,
    "spare_slots": lambda value, more: value + 1,
    "lost_shards": lambda value, more: value + 1,
}


@settings(max_examples=20)
@given(st.sampled_from(MODELS), demands(), st.sampled_from(sorted(HARDER)), st.floats(1.01, 4))
def test_a_harder_question_never_takes_fewer_gpus(name: str, demand: Demand, key: str, more: float) -> None:
    harder = replace(demand, **{key: HARDER[key](getattr(demand, key), more)})
    assert fewest(name, harder) >= fewest(name, demand)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-120b"])
def test_the_search_finds_the_fewest_of_all_layouts(name: str) -> None:
    """Brute force over every number of routers and shards of one service."""
    from placement.sizing import plan

    facts, speed = known(name), Roofline(known(name), H100, CHAT)
    serving = [
        routers + shards
        for shards in range(2, 9)
        for routers in range(1, 9)
        for replicas in (1, 2)
        if replicas < shards
        and plan._shard_fits(speed, routers, shards, replicas)
        and plan._layout_of_routers(speed, routers, shards, replicas) is not None
    ]
    best = plan_layout(facts, H100, CHAT)
    assert best.services == 1
    assert best.gpus == min(serving)


def test_alternatives_are_in_order_and_differ() -> None:
    found = best_layouts(known("qwen3-30b-a3b"), H100, replace(CHAT, rate=40), 4)
    assert [layout.gpus for layout in found] == sorted(layout.gpus for layout in found)
    assert len({(layout.services, layout.routers, layout.shards) for layout in found}) == 4


def test_a_load_beyond_one_service_is_divided() -> None:
    """Mixtral has 8 experts, so that one service has at most 8 shards."""
    best = plan_layout(known("mixtral-8x22b"), H200, replace(CHAT, isl=2000, rate=60, max_gpus=256))
    assert best.services > 1


def test_the_smallest_question_has_the_smallest_answer() -> None:
    demand = replace(CHAT, isl=1, osl=1, rate=1e-6, lost_shards=0, spare_slots=0)
    best = plan_layout(known("olmoe-1b-7b"), H100, demand)
    assert (best.services, best.routers, best.shards, best.slots, best.replicas) == (1, 1, 1, 64, 1)
    engines = plan_engines(known("olmoe-1b-7b"), H100, demand)
    assert engines is not None
    assert engines.gpus == 1


@pytest.mark.parametrize(
    ("name", "gpu", "change", "told"),
    [
        ("mixtral-8x22b", "h100", {}, "each of 8 shards needs"),
        ("glm-5", "a10g", {"max_gpus": 512}, r"a router is 1 GPU\(s\)"),
        ("gpt-oss-20b", "h100", {"tpot_ms": 1.0}, "a step of one sequence takes"),
        ("gpt-oss-20b", "h100", {"rate": 1e5}, "do not carry 100000 requests/s"),
        ("gpt-oss-20b", "h100", {"lost_shards": 40, "max_gpus": 32}, "40 lost shards leave none"),
    ],
)
def test_what_stands_in_the_way_is_told(name: str, gpu: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(NoLayoutError, match=told):
        plan_layout(known(name), gpu_named(gpu), replace(CHAT, **change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"isl": 0}, "isl is 0, expected at least 1"),
        ({"rate": 0.0}, "rate is 0.0, expected more than 0"),
        ({"rate": float("nan")}, "rate is nan, expected a number"),
        ({"tpot_ms": float("inf")}, "tpot_ms is inf"),
        ({"headroom": 25}, "headroom is 25, expected a share"),
        ({"spare_slots": -1}, "spare_slots is -1"),
        ({"skew": 9.0}, "skew is 9.0"),
        ({"router_gpus": 0}, "router_gpus is 0, expected at least 1"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(SizingError, match=told):
        replace(CHAT, **change)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(SizingError, match="are 4200, but olmoe-1b-7b takes 4096"):
        plan_layout(known("olmoe-1b-7b"), H100, replace(CHAT, isl=4000))


@pytest.mark.parametrize(
    ("name", "count", "told"),
    [
        ("qwen3-30b-a3b", 16, "router_gpus is 16, expected at most 8: a router is in one node"),
        ("qwen3-30b-a3b", 3, "router_gpus is 3, which cannot divide the 32 heads and 4 KV heads of qwen3-30b-a3b"),
        ("deepseek-v3", 6, "cannot divide the 128 heads"),
    ],
)
def test_a_router_on_gpus_that_cannot_share_it_is_refused(name: str, count: int, told: str) -> None:
    with pytest.raises(SizingError, match=told):
        plan_layout(known(name), H200, replace(CHAT, router_gpus=count))


def test_gpus_of_a_router_divide_what_it_holds() -> None:
    """But pairs, which each of them has with each shard, and a latent cache."""
    for name, of_cache in (("qwen3-30b-a3b", 1 / 4), ("deepseek-v3", 1)):
        whole, part = (
            {
                line.what: line.nbytes
                for line in router_memory(
                    known(name), 2.0, chunk=1024, sequences=8, context=4000, shards=5, workers=workers
                ).lines
            }
            for workers in (1, 8)
        )
        assert part["dense weights"] == whole["dense weights"] / 8
        assert part["KV cache"] == whole["KV cache"] * of_cache, "qwen3 has 4 KV heads"
        assert part["pairs"] == whole["pairs"] > 0
        assert part["activations"] < whole["activations"]


def test_a_router_on_several_gpus_holds_what_one_cannot() -> None:
    demand = replace(CHAT, tpot_ms=100, rate=1, max_gpus=256)
    with pytest.raises(
        NoLayoutError, match=r"each GPU of a router needs .* a router is 1 GPU\(s\); take .*--router-gpus"
    ):
        plan_layout(known("deepseek-v3"), gpu_named("l4"), demand)
    best = plan_layout(known("deepseek-v3"), gpu_named("l4"), replace(demand, router_gpus=4))
    assert best.gpus == best.services * (4 * best.routers + best.shards)
    assert best.shard.nbytes > 4 * best.services * best.routers * pair_bytes(known("deepseek-v3"))


def test_unknown_gpus_are_refused_with_the_nearest() -> None:
    with pytest.raises(SizingError, match="did you mean h100"):
        gpu_named("h1000")


def test_gpus_have_names_that_ray_knows() -> None:
    from cluster.refusals.serve_options import accelerator_types

    assert {gpu.ray for gpu in gpus().values()} <= set(accelerator_types())
    assert all(gpu.constants.memory_bytes_per_s > 0 for gpu in gpus().values())


@pytest.mark.parametrize("name", ["deepseek-v3", "olmoe-1b-7b"])
def test_pairs_are_as_large_as_the_wires_own_count(name: str) -> None:
    facts = known(name)
    row = 2 * facts.hidden_size
    counted = request_capacity(ROWS_PER_DISPATCH, facts.top_k, row) + reply_capacity(ROWS_PER_DISPATCH, row)
    assert counted <= pair_bytes(facts) <= 1.01 * counted


def test_an_expert_layer_takes_longer_with_more_tokens_and_no_longer_with_more_routers() -> None:
    times = Roofline(known("qwen3-30b-a3b"), H100, CHAT).experts
    alone = [times.layer(tokens, tokens, 1e-4, Half(4, 1, 5)).total_s for tokens in (1, 3, 64, 1000, 5000, 100_000)]
    assert alone == sorted(alone)
    shared = [times.layer(4096 / routers, 4096, 1e-4, Half(4, routers, 8)).total_s for routers in (1, 2, 3, 4)]
    assert shared == sorted(shared, reverse=True)


def test_slots_have_room_for_a_loss() -> None:
    assert slots_of(8, 8, 1, replace(CHAT, spare_slots=0, lost_shards=0)) == 1
    assert slots_of(8, 8, 1, replace(CHAT, spare_slots=0, lost_shards=1)) == 2
    assert slots_of(256, 16, 1, CHAT) == 18
    assert slots_of(8, 4, 2, CHAT) == 5


def sizing(name: str, demand: Demand, **more: Any) -> Sizing:
    return size(known(name), H100, demand, alternatives=0, **more)


def test_the_verdict_follows_the_numbers() -> None:
    """A model that fits one GPU needs no second half; a question that plain EP cannot answer goes to the split."""
    small = sizing("gpt-oss-20b", CHAT, price_per_gpu_hour=2.0)
    assert not small.verdict.pays
    assert small.engines is not None
    assert small.engines.gpus < small.layout.gpus
    assert small.price_per_hour(small.layout.gpus) == 2 * small.layout.gpus
    assert small.price_per_million(3) == pytest.approx(6 / (5 * 200 * 3600) * 1e6)
    without = replace(small, engines=None, engines_equal=None)
    assert without.verdict.pays
    faster = replace(small, engines=replace(small.engines, count=9))
    assert faster.verdict.pays


def test_a_layout_carries_at_least_what_was_asked() -> None:
    found = sizing("qwen3-30b-a3b", CHAT)
    assert found.carries >= CHAT.rate
    best = found.layout
    beyond = replace(CHAT, rate=1.03 * found.carries)
    layouts = best_layouts(found.facts, H100, beyond, 30)
    assert not any(same_numbers(layout, best) for layout in layouts)


def same_numbers(one: Layout, other: Layout) -> bool:
    return (one.services, one.routers, one.shards, one.replicas) == (
        other.services, other.routers, other.shards, other.replicas,
    )  # fmt: skip
