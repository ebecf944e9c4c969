"""Every figure of an evaluation, counted one token at a time from the ranks that dispatch chooses.

T tokens, L layers, K experts of one, E experts, R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from placement.placement import Placement
from placement.rule.evaluate import (
    balancedness_of,
    count_visits,
    dispatch_trace,
    evaluate,
    even_split_loads,
)
from placement.traces.trace import ActivationTrace

# Two nodes of two ranks, two slots each. Layer 1 is no repetition of layer 0, nor are its tokens.
PLACEMENT = Placement(4, 2, 5, np.array([[0, 1, 2, 0, 3, 4, 4, 2], [4, 3, 2, 1, 0, 4, 3, -1]]))
IDS_TLK = np.array(
    [
        [[0, 1], [0, 4]],
        [[2, 3], [1, 2]],
        [[4, 0], [3, 4]],
        [[4, 2], [0, 1]],
        [[0, 2], [4, -1]],
        [[3, -1], [2, 0]],
    ],
    np.int16,
)


def counted(ranks_TK: np.ndarray, num_ranks: int, per_node: int, num_nodes: int) -> dict[str, Any]:
    """The figures of one layer in plain Python."""
    loads, rows, visits = [0] * num_ranks, [0] * num_ranks, []
    nodes = far = 0
    for token, ranks in enumerate(ranks_TK.tolist()):
        for rank in ranks:
            if rank >= 0:
                loads[rank] += 1
        distinct = {rank for rank in ranks if rank >= 0}
        for rank in distinct:
            rows[rank] += 1
        visits.append(len(distinct))
        nodes += len({rank // per_node for rank in distinct})
        far += sum(rank // per_node != token % num_nodes for rank in distinct)
    tokens = len(ranks_TK)
    return {
        "load": loads,
        "rows": rows,
        "fan_out": sum(visits) / tokens,
        "node_fan_out": nodes / tokens,
        "far_fan_out": far / tokens,
        "histogram": [visits.count(n) for n in range(ranks_TK.shape[1] + 1)],
        "balancedness": sum(loads) / num_ranks / max(loads),
    }


@pytest.mark.parametrize("prefer_local_replicas", [False, True])
def test_every_figure_of_every_layer(prefer_local_replicas: bool) -> None:
    trace = ActivationTrace(IDS_TLK, 5)
    found = evaluate(PLACEMENT, trace, prefer_local_replicas=prefer_local_replicas)
    ranks_LTK = dispatch_trace(PLACEMENT, IDS_TLK, prefer_local_replicas)
    expected = [counted(ranks_TK, 4, 2, 2) for ranks_TK in ranks_LTK]
    assert expected[0] != expected[1], "else one layer's figures could stand for both"
    for name, values in (
        ("load", found.load_LR),
        ("rows", found.rows_LR),
        ("fan_out", found.fan_out),
        ("node_fan_out", found.node_fan_out),
        ("far_fan_out", found.far_fan_out),
        ("histogram", found.fan_out_histogram),
        ("balancedness", found.balancedness),
    ):
        assert values.tolist() == [pytest.approx(layer[name]) for layer in expected], name
    assert found.tokens == 6
    assert (found.rows_LR.dtype, found.load_LR.dtype) == (np.int64, np.float64)


def test_near_replicas_first_changes_what_is_far() -> None:
    trace = ActivationTrace(IDS_TLK, 5)
    plain, near = (evaluate(PLACEMENT, trace, prefer_local_replicas=near) for near in (False, True))
    assert (near.far_fan_out <= plain.far_fan_out).all()
    assert (near.far_fan_out < plain.far_fan_out).any()
    assert evaluate(PLACEMENT, trace).far_fan_out.tolist() == plain.far_fan_out.tolist(), "which is not the default"


def test_the_ranks_of_a_whole_trace_hold_the_experts_and_padding_has_none() -> None:
    for prefer in (False, True):
        ranks_LTK = dispatch_trace(PLACEMENT, IDS_TLK, prefer)
        assert (ranks_LTK.shape, ranks_LTK.dtype) == ((2, 6, 2), np.int32)
        for layer, token, k in np.ndindex(2, 6, 2):
            expert, rank = int(IDS_TLK[token, layer, k]), int(ranks_LTK[layer, token, k])
            held = PLACEMENT.physical_to_logical_map[layer].reshape(4, 2)
            assert rank == -1 if expert < 0 else expert in held[rank]


def test_no_replica_is_preferred_unless_asked_for() -> None:
    plain, local = (dispatch_trace(PLACEMENT, IDS_TLK, prefer).tolist() for prefer in (False, True))
    assert dispatch_trace(PLACEMENT, IDS_TLK).tolist() == plain != local


def test_loads_of_an_even_split() -> None:
    loads_LE = np.array([[4.0, 1, 6, 3, 2], [8.0, 5, 7, 4, 6]])
    # Layer 0: experts 0, 2 and 4 have two replicas each. Layer 1: 3 and 4.
    expected = [[2 + 1, 3 + 2, 3 + 1, 1 + 3], [3 + 2, 7 + 5, 8 + 3, 2]]
    assert even_split_loads(PLACEMENT, loads_LE).tolist() == expected
    assert balancedness_of(np.array(expected, float)).tolist() == [16 / 4 / 5, 30 / 4 / 12]


def test_a_layer_that_nobody_wanted_is_in_balance() -> None:
    assert balancedness_of(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [1, 2 / 3]
    assert balancedness_of(np.array([[0.25, 0.75]])).tolist() == [2 / 3]


def test_visits_are_counted_once_a_token_and_padding_not_at_all() -> None:
    assert count_visits(np.array([[1, 1, 0], [-1, -1, 2], [0, 0, 0], [-1, -1, -1], [2, 0, 1]])) == 2 + 1 + 1 + 0 + 3
    assert count_visits(np.zeros((0, 3), int)) == 0


def test_the_summary_is_of_means_and_the_worst_layer() -> None:
    found = evaluate(PLACEMENT, ActivationTrace(IDS_TLK, 5))
    assert found.balancedness[0] != found.balancedness[1]
    assert found.summary() == {
        "fan_out": pytest.approx(sum(found.fan_out) / 2),
        "node_fan_out": pytest.approx(sum(found.node_fan_out) / 2),
        "far_fan_out": pytest.approx(sum(found.far_fan_out) / 2),
        "balancedness": pytest.approx(sum(found.balancedness) / 2),
        "balancedness_even_split": pytest.approx(sum(found.balancedness_even_split) / 2),
        "worst_balancedness": pytest.approx(min(found.balancedness)),
        "tokens": 6,
    }


def test_counts_alone_give_an_even_split_and_no_fan_out() -> None:
    counts_LE = np.array([[4, 1, 6, 3, 2], [8, 5, 7, 4, 6]])
    found = evaluate(PLACEMENT, ActivationTrace(np.zeros((0, 2, 2), np.int16), 5, counts=counts_LE))
    for figure in (found.fan_out, found.node_fan_out, found.far_fan_out):
        assert figure.shape == (2,)
        assert np.isnan(figure).all()
    assert found.load_LR.tolist() == even_split_loads(PLACEMENT, counts_LE).tolist()
    assert found.balancedness.tolist() == found.balancedness_even_split.tolist() == [0.8, 0.625]
    assert (found.rows_LR.tolist(), found.fan_out_histogram.tolist(), found.tokens) == ([[0] * 4] * 2, [[0] * 3] * 2, 0)


def test_the_even_split_counts_what_the_sets_want_where_both_are_there() -> None:
    trace = ActivationTrace(IDS_TLK, 5, counts=np.full((2, 5), 100))
    found = evaluate(PLACEMENT, trace)
    wanted_LE = np.array([[np.sum(IDS_TLK[:, layer] == expert) for expert in range(5)] for layer in range(2)])
    expected = balancedness_of(even_split_loads(PLACEMENT, wanted_LE))
    assert found.balancedness_even_split.tolist() == expected.tolist()


def test_more_experts_a_token_than_the_rule_takes_are_refused() -> None:
    trace = ActivationTrace(np.zeros((1, 1, 64), np.int16), 64)
    with pytest.raises(ValueError, match="top-k is 64, at most 63"):
        evaluate(Placement.linear(1, 64, 2), trace)
    assert evaluate(Placement.linear(1, 64, 2), ActivationTrace(np.zeros((1, 1, 63), np.int16), 64)).tokens == 1
