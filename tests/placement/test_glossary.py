"""The glossary's figures, worked out again from the code it explains.

T tokens, K experts of one, E experts, R ranks, s slots of a rank.
"""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pytest

from placement.capacity.hardware import H100, ModelShape
from placement.placement import Placement
from placement.rule.evaluate import dispatch_trace, evaluate
from placement.traces.trace import ActivationTrace

TEXT = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
LAYERS, EXPERTS, TOP_K, RANKS, NODES, SLOTS, TOKENS = 58, 256, 8, 32, 4, 9, 64
MODEL = ModelShape(hidden_size=7168, intermediate_size=2048, weight_bytes=1.0, activation_bytes=2.0)
PLAIN = Placement.linear(LAYERS, EXPERTS, RANKS, NODES)
TOKEN = [0, 1, 2, 8, 9, 64, 65, 255]
# Distinct groups of equally many experts that 8 of 256 drawn at random fall into.
RANDOM_FAN_OUT, RANDOM_NODE_FAN_OUT = (
    groups * (1 - comb(EXPERTS - EXPERTS // groups, TOP_K) / comb(EXPERTS, TOP_K)) for groups in (RANKS, NODES)
)
ACTIVATED = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** TOKENS)
ROW_BYTES = TOKENS * RANDOM_FAN_OUT * MODEL.row_bytes


def with_redundant_experts() -> Placement:
    """Rank r's own eight experts, and in its ninth slot the first expert of rank r + 8."""
    slots_Rs = np.full((RANKS, SLOTS), -1)
    slots_Rs[:, :-1] = np.arange(EXPERTS).reshape(RANKS, -1)
    slots_Rs[:, -1] = (np.arange(RANKS) + 8) % RANKS * 8
    return Placement(RANKS, NODES, EXPERTS, np.tile(slots_Rs.ravel(), (LAYERS, 1)))


def figures_of_the_model() -> list[str]:
    layer_bytes = EXPERTS * MODEL.expert_bytes
    return [
        f"the first 3 dense: {LAYERS} MoE layers",
        f"256 a layer, {LAYERS * EXPERTS:,} in all",
        f"a token uses {TOP_K / EXPERTS:.3%}".replace("%", " %"),
        f"in FP8: {MODEL.expert_bytes:,} bytes",
        f"{layer_bytes / 1e9:.1f} GB a layer, {LAYERS * layer_bytes / 1e9:.1f} GB in all",
        f"in bf16: {MODEL.row_bytes:,.0f} bytes",
        f"64 x 8 = {TOKENS * TOP_K} pairs a layer",
    ]


def figures_of_a_placement() -> list[str]:
    placement = with_redundant_experts()
    table_EM, count_E = placement.logical_to_physical_map[0], placement.logical_replica_count[0]
    first_rank = ", ".join(map(str, placement.experts_of_rank(0)[0]))
    return [
        f"{NODES} nodes of {placement.num_ranks // NODES} ranks: rank 9 is on node {placement.node_of_rank_R[9]}",
        f"{placement.slots_per_rank} a rank, {placement.num_slots} a layer",
        f"9 x 58 x {MODEL.expert_bytes / 1e6:.1f} MB = {SLOTS * LAYERS * MODEL.expert_bytes / 1e9:.1f} GB",
        f"288 - 256 = {placement.num_slots - EXPERTS}",
        "{} x {} numbers".format(*placement.physical_to_logical_map.shape),
        f"slots 0 to 8 hold {first_rank}",
        f"M = {table_EM.shape[1]}: expert 0 is in slots {table_EM[0].tolist()}, expert 1 in {table_EM[1].tolist()}",
        f"2 for {(count_E == 2).sum()} experts, 1 for {(count_E == 1).sum()}",
    ]


def figures_of_quality() -> list[str]:
    ranks = sorted({expert // (EXPERTS // RANKS) for expert in TOKEN})
    nodes = sorted({PLAIN.node_of_rank_R[rank] for rank in ranks})
    remote = [rank for rank in ranks if PLAIN.node_of_rank_R[rank] != 0]
    mean = TOKENS * TOP_K // RANKS
    return [
        f"512 pairs on 32 ranks are {mean} each; with 20 on the fullest, {mean / 20}",
        f"{20 / mean} for that",
        "wants experts {}, {}, {}, {}, {}, {}, {} and {}".format(*TOKEN),
        "ranks {}, {}, {} and {}, so ".format(*ranks) + f"{len(ranks)}",
        f"| {RANDOM_FAN_OUT:.2f} |",
        "nodes {}, {} and {}".format(*nodes) + f": {len(nodes)}; at random {RANDOM_NODE_FAN_OUT:.2f}",
        "From a router on node 0: ranks {} and {}, so ".format(*remote) + f"{len(remote)}",
    ]


def figures_of_cost() -> list[str]:
    read_bytes = ACTIVATED / RANKS * MODEL.expert_bytes
    moves = 20 * LAYERS
    return [
        f"at random {ACTIVATED:.1f} of 256, {ACTIVATED / RANKS:.2f} a rank",
        f"at {H100.memory_bytes_per_s / 1e12:.1f} TB/s",
        f"{read_bytes / 1e6:.0f} MB: {read_bytes / H100.memory_bytes_per_s * 1e6:.0f} us a layer",
        f"64 x {RANDOM_FAN_OUT:.2f} = {TOKENS * RANDOM_FAN_OUT:.0f} rows",
        f"{ROW_BYTES / 1e6:.2f} MB a layer one way, {ROW_BYTES * 2 * LAYERS / 1e6:.0f} MB a step",
        f"20 moves a layer: {moves:,} copies, {moves * MODEL.expert_bytes / 1e9:.1f} GB",
    ]


@pytest.mark.parametrize(
    "figure", [*figures_of_the_model(), *figures_of_a_placement(), *figures_of_quality(), *figures_of_cost()]
)
def test_a_figure_of_the_glossary_is_what_the_code_says(figure: str) -> None:
    assert figure in TEXT


def test_the_rule_makes_of_the_example_token_what_the_glossary_says() -> None:
    trace = ActivationTrace(np.tile(np.array(TOKEN), (1, LAYERS, 1)), EXPERTS)
    found = evaluate(PLAIN, trace)
    assert (found.fan_out[0], found.node_fan_out[0], found.far_fan_out[0]) == (4, 3, 2)
    redundant = with_redundant_experts()
    assert "cover gives 0, 1, 2 and 64 to rank 0, and only 65 to rank 8; then rank 8 takes 64." in TEXT
    assert "A token that does without 65 visits 3 ranks" in TEXT
    assert dispatch_trace(redundant, trace.topk_ids)[0, 0].tolist() == [0, 0, 0, 1, 1, 8, 8, 31]
    without_65 = ActivationTrace(np.where(trace.topk_ids == 65, -1, trace.topk_ids), EXPERTS)
    assert evaluate(redundant, without_65).fan_out[0] == 3
