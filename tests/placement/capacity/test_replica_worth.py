"""Replicas that pay and ones that do not: where reading weights decides, and where computing does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.capacity.hardware import Constants, ModelShape
from placement.capacity.replica_worth import Worth, layer_seconds, replica_gains, without_idle_replicas
from placement.placement import Placement
from placement.traces.trace import ActivationTrace, TraceError

READS = Constants(1e3, 1e12, 0.0, 0.0, 0.0)  # reading weights is all that takes time
COMPUTES = Constants(1e15, 1e3, 0.0, 0.0, 0.0)  # computing is
MODEL = ModelShape(hidden_size=10, intermediate_size=4, weight_bytes=1.0, activation_bytes=1e-9)  # 120 B, 240 flops
TWICE = Placement(2, 1, 4, np.array([[0, 1, 3, 2, 3, 0]]))  # experts 3 and 0 on both ranks


def hot_trace(num_layers: int = 1) -> ActivationTrace:
    """Tokens want expert 0, which is half of the load, and one of the others in turn."""
    ids_T = np.stack([np.zeros(66, int), 1 + np.arange(66) % 3], axis=1)
    return ActivationTrace(np.tile(ids_T[:, None].astype(np.int16), (1, num_layers, 1)), 4)


def worth(constants: Constants, *step_tokens: int) -> Worth:
    return Worth(MODEL, constants, step_tokens=step_tokens)


def test_seconds_by_hand() -> None:
    alone = Placement(2, 1, 4, np.array([[0, 1, 2, 3]]))
    # 33 tokens want expert 0, 11 of them expert 1 on the same rank.
    assert layer_seconds(alone, hot_trace(), 0, worth(READS, 66)) == pytest.approx([2 * 120 / 1e3])
    assert layer_seconds(alone, hot_trace(), 0, worth(COMPUTES, 66)) == pytest.approx([(66 + 22) * 240 / 1e3])
    slow = replace(alone, speeds=(0.5, 1.0))
    assert layer_seconds(slow, hot_trace(), 0, worth(COMPUTES, 66)) == pytest.approx([(66 + 22) * 480 / 1e3])


def test_a_replica_of_the_hottest_expert_pays_where_computing_decides_and_goes_where_reading_does() -> None:
    trace = hot_trace()
    assert min(replica_gains(TWICE, trace, 0, worth(COMPUTES, 66)).values()) > 0
    left = without_idle_replicas(TWICE, trace, worth(COMPUTES, 66))
    assert (left.logical_replica_count[0] == [2, 1, 1, 1]).all() or (
        left.logical_replica_count[0] == [2, 1, 1, 2]
    ).all()
    assert layer_seconds(left, trace, 0, worth(COMPUTES, 66)) <= layer_seconds(TWICE, trace, 0, worth(COMPUTES, 66))
    lean = without_idle_replicas(TWICE, trace, worth(READS, 66))
    assert lean.logical_replica_count.tolist() == [[1, 1, 1, 1]]
    assert layer_seconds(lean, trace, 0, worth(READS, 66)) <= layer_seconds(TWICE, trace, 0, worth(READS, 66))


def test_other_layers_and_promised_replicas_stay() -> None:
    both = replace(TWICE, physical_to_logical_map=np.tile(TWICE.physical_to_logical_map, (2, 1)))
    kept = without_idle_replicas(both, hot_trace(2), worth(READS, 8, 66), min_replicas=2)
    assert kept == both
    lean = without_idle_replicas(both, hot_trace(2), worth(READS, 8, 66))
    assert lean.logical_replica_count.tolist() == [[1, 1, 1, 1]] * 2


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_is_never_slower_and_lacks_no_expert(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.gumbel(size=(200, 2, 12)) + np.linspace(0, 2, 12), axis=2)[:, :, -3:].astype(np.int16)
    rows = [np.concatenate([rng.permutation(12), rng.integers(0, 12, 8)]) for _ in range(2)]
    placement, trace = Placement(4, 1, 12, np.array(rows)), ActivationTrace(ids, 12)
    by = Worth(MODEL, Constants(1e3, 4e3, 0.0, 0.0, 0.0), step_tokens=(8, 64))
    left = without_idle_replicas(placement, trace, by)
    for layer in range(2):
        before_B, after_B = (layer_seconds(each, trace, layer, by) for each in (placement, left))
        assert (after_B / before_B).mean() <= 1 + 1e-12
    assert (left.logical_replica_count >= 1).all()
    assert (left.physical_to_logical_map[left.physical_to_logical_map >= 0].size) <= 40


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(TraceError, match="steps of 67 tokens need sets of as many, the trace has 66"):
        layer_seconds(TWICE, hot_trace(), 0, worth(READS, 67))
    counts_alone = ActivationTrace(np.zeros((0, 1, 1), np.int16), 4, counts=np.ones((1, 4)))
    with pytest.raises(TraceError, match="the trace has only counts"):
        layer_seconds(TWICE, counts_alone, 0, worth(READS, 1))
    with pytest.raises(ValueError, match="step_tokens are"):
        Worth(step_tokens=())
    with pytest.raises(ValueError, match="min_replicas is 0"):
        without_idle_replicas(TWICE, hot_trace(), worth(READS, 66), min_replicas=0)
