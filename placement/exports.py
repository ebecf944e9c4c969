"""Placements in the formats of vLLM and SGLang.

L layers, E experts, S slots, M most replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from placement.placement import EMPTY, Placement


def export_vllm(placement: Placement, *, fill_empty: bool = False) -> dict[str, Any]:
    """The placement under the names and in the shapes of vLLM's `EplbState`, as plain JSON values.

    `physical_to_logical_map` [L, S], `logical_to_physical_map` [L, E, M] padded with -1, `logical_replica_count`
    [L, E], one row for each MoE layer, and the settings that give an engine as many slots. vLLM 0.32 reads no map at
    start; this is for an EPLB policy that returns it. See `export_sglang` for empty slots.
    """
    placement = _filled(placement, fill_empty)
    return {
        "num_ranks": placement.num_ranks,
        "num_nodes": placement.num_nodes,
        "num_experts": placement.num_experts,
        "physical_to_logical_map": placement.physical_to_logical_map.tolist(),
        "logical_to_physical_map": placement.logical_to_physical_map.tolist(),
        "logical_replica_count": placement.logical_replica_count.tolist(),
        "engine_args": {
            "enable_expert_parallel": True,
            "enable_eplb": True,
            "eplb_config": {"num_redundant_experts": placement.num_slots - placement.num_experts},
        },
    }


def export_sglang(
    placement: Placement,
    *,
    layers: Sequence[int] | None = None,
    num_hidden_layers: int | None = None,
    fill_empty: bool = False,
) -> dict[str, Any]:
    """What SGLang's `--init-expert-location` reads as JSON: only `physical_to_logical_map`, as it rejects other keys.

    SGLang needs a row for each decoder layer: `layers` gives the decoder layer of each row, `num_hidden_layers` their
    total. Other layers get experts in order, which nothing reads. Start SGLang with `--ep-num-redundant-experts` S - E.
    Its slots cannot be empty: empty slots raise ValueError. With `fill_empty` they repeat an expert of the same rank.
    That changes no fan-out, but draws load there, since engines split it evenly over replicas.
    """
    placement = _filled(placement, fill_empty)
    rows_LS = placement.physical_to_logical_map
    if layers is None and num_hidden_layers is None:
        return {"physical_to_logical_map": rows_LS.tolist()}
    named = list(range(placement.num_layers)) if layers is None else [int(layer) for layer in layers]
    total = max(named) + 1 if num_hidden_layers is None else num_hidden_layers
    if len(named) != placement.num_layers or len(set(named)) != len(named):
        raise ValueError(f"layers must name {placement.num_layers} different decoder layers, got {named}")
    if min(named) < 0 or max(named) >= total:
        raise ValueError(f"layers are {min(named)} to {max(named)}, expected 0 to {total - 1}")
    all_LS = np.tile(np.arange(placement.num_slots) % placement.num_experts, (total, 1))
    all_LS[named] = rows_LS
    return {"physical_to_logical_map": all_LS.tolist()}


def _filled(placement: Placement, fill_empty: bool) -> Placement:
    map_LS = placement.physical_to_logical_map
    empty = np.argwhere(map_LS == EMPTY)
    if not empty.size:
        return placement
    if not fill_empty:
        raise ValueError(
            f"layer {empty[0][0]}: slot {empty[0][1]} is empty ({len(empty)} in all), but the engine needs an "
            "expert in each; plan without empty slots or fill them (fill_empty)"
        )
    filled_LRs = map_LS.reshape(placement.num_layers, placement.num_ranks, -1).copy()
    for layer, slot in empty.tolist():
        rank, local = divmod(slot, placement.slots_per_rank)
        held = placement.experts_of_rank(rank)[layer]
        held = held[held >= 0]
        # A rank without experts takes any of the layer's.
        filled_LRs[layer, rank, local] = held[local % len(held)] if len(held) else slot % placement.num_experts
    return replace(placement, physical_to_logical_map=filled_LRs.reshape(map_LS.shape))
