"""Experts that are not in a shard's memory: held, at the price of their copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from placement.capacity.hardware import Constants, ModelShape
from placement.capacity.residency import Offload, Residents
from placement.capacity.step_cost import step_cost
from placement.placement import Placement
from placement.traces.trace import ActivationTrace

MODEL = ModelShape(hidden_size=10, intermediate_size=4, weight_bytes=1.0, activation_bytes=1.0)  # 120 B
UNIT = Constants(memory_bytes_per_s=1.0, flops_per_s=1e6, call_s=3.0, router_s=5.0, router_token_s=0.5)


def test_a_copy_is_a_price_by_hand() -> None:
    """One shard, one of three experts in memory: the trace's most used one."""
    trace = ActivationTrace(np.array([[[0]], [[0]], [[2]]], np.int16), 3)
    given: dict[str, Any] = {"model": MODEL, "constants": UNIT, "tokens": 3, "batches": 1}
    placement = Placement.linear(1, 3, 1)
    whole = step_cost(trace, placement, **given)
    assert (whole.copy_s.tolist(), whole.hit_rate) == ([0.0], 1.0)
    some = step_cost(trace, placement, **given, offload=Offload(1 / 3, 60.0))
    assert some.copy_s.tolist() == [120 / 60]
    assert some.hit_rate == 0.5
    assert some.shard_s.tolist() == [whole.shard_s[0] + 2.0]
    for think_s, left_s in ((0.5, 1.5), (9.0, 0.5)):
        hidden = step_cost(trace, placement, **given, offload=Offload(1 / 3, 60.0, foreseen=0.75), think_s=think_s)
        assert hidden.copy_s.tolist() == [left_s], "three quarters of it while the router thinks, if it does so long"


def used(*experts: int, num_experts: int = 4) -> np.ndarray:
    """One router's request to one shard."""
    mask = np.zeros((1, 1, num_experts), bool)
    mask[0, 0, list(experts)] = True
    return mask


def test_the_expert_that_few_calls_use_leaves_though_it_was_used_last() -> None:
    """Two of four in memory: the trace's hottest, 0 and 1, then by the calls."""
    residents = Residents(Placement.linear(1, 4, 1), np.array([[9.0, 8, 1, 0]]), Offload(0.5, 1.0))
    for _ in range(3):
        assert residents.use(0, used(0)).tolist() == [[0]]
    assert residents.use(0, used(2)).tolist() == [[1]], "in place of 1, which no call has used"
    assert residents.use(0, used(3)).tolist() == [[1]], "in place of 2, which one call has used; 0 was used by three"
    assert residents.use(0, used(0, 3)).tolist() == [[0]]
    assert (residents.uses, residents.misses) == (7, 2)


@pytest.mark.parametrize("layers_share", [False, True])
def test_layers_that_share_give_room_to_the_layer_at_hand(layers_share: bool) -> None:
    """Two layers with two of four experts in memory each: where they share it, a third expert of one layer takes the
    place of the other's least used one, else that of its own.
    """
    loads = np.array([[9.0, 8, 1, 0]] * 2)
    residents = Residents(Placement.linear(2, 4, 1), loads, Offload(0.5, 1.0, layers_share=layers_share))
    assert residents.use(0, used(0, 1)).tolist() == [[0]]
    assert residents.use(1, used(0)).tolist() == [[0]]
    assert residents.use(0, used(0, 2)).tolist() == [[1]]
    assert residents.use(0, used(0, 1)).tolist() == [[0 if layers_share else 1]], "1 stayed if the other layer's 1 left"


def test_a_shard_evicts_what_it_holds_and_no_other_shards_experts() -> None:
    residents = Residents(Placement.linear(1, 4, 2), np.ones((1, 4)), Offload(0.5, 1.0))
    both = np.zeros((1, 2, 4), bool)
    both[0, 0, 1] = both[0, 1, 2] = True
    assert residents.use(0, both).tolist() == [[1, 0]], "0 and 2 were there at first"
    both[0, 0, 0], both[0, 0, 1] = True, False
    assert residents.use(0, both).tolist() == [[1, 0]]


def test_routers_that_come_later_find_what_came_for_the_first() -> None:
    residents = Residents(Placement.linear(1, 4, 2), np.ones((1, 4)), Offload(0.5, 1.0))
    used = np.zeros((2, 2, 4), bool)
    used[:, 0, 0] = used[:, 1, 3] = True
    assert residents.use(0, used)[1].tolist() == [0, 0]


def test_shards_with_room_for_all_never_miss() -> None:
    rng = np.random.default_rng(1)
    trace = ActivationTrace(rng.integers(0, 16, (200, 2, 2)).astype(np.int16), 16)
    placement = Placement.linear(2, 16, 4, min_replicas=2)
    given: dict[str, Any] = {"model": MODEL, "constants": UNIT, "tokens": 8, "router_nodes": [0, 0]}
    whole = step_cost(trace, placement, **given)
    costs = [step_cost(trace, placement, **given, offload=Offload(share, 10.0)) for share in (1.0, 0.75, 0.5, 0.25)]
    assert costs[0].step_s == whole.step_s
    assert costs[0].hit_rate == 1
    assert [cost.step_s for cost in costs] == sorted(cost.step_s for cost in costs)
    assert [cost.hit_rate for cost in costs] == sorted((cost.hit_rate for cost in costs), reverse=True)
    assert costs[-1].wait_s.sum() > whole.wait_s.sum(), "others wait for the copies, too"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((0.0, 1.0), "resident_fraction is 0.0, expected more than 0 and at most 1"),
        ((1.5, 1.0), "resident_fraction is 1.5, expected more than 0 and at most 1"),
        ((0.5, 0.0), "copy_bytes_per_s is 0.0, expected more than 0"),
        ((0.5, 1.0, None, 1.5), "foreseen is 1.5, expected 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_named(values: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        Offload(*values)
