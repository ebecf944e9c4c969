"""Placements as other engines take them: vLLM, vLLM on Ascend, SGLang and TensorRT-LLM.

Engines have equally many slots on every rank and an expert in each: empty slots raise ValueError, and with `fill_empty`
they repeat an expert of the same rank. That changes no fan-out, but draws load there, since engines split it evenly
over replicas. Engines know neither speeds of ranks nor nodes of unequal size. A placement that lacks experts raises
ValueError.

L layers, E experts, S slots, M most replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from placement.placement import EMPTY, Placement


def export_vllm(placement: Placement, *, fill_empty: bool = False) -> dict[str, Any]:
    """The placement under the names and in the shapes of vLLM's `EplbState`, as plain JSON values.

    `physical_to_logical_map` [L, S], `logical_to_physical_map` [L, E, M] padded with -1, `logical_replica_count`
    [L, E], one row for each MoE layer, and the settings that give an engine as many slots. vLLM 0.32 reads no map at
    start; this is for an EPLB policy that returns it.
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


def export_vllm_ascend(placement: Placement, *, fill_empty: bool = False) -> dict[str, Any]:
    """What vLLM on Ascend reads as JSON (`expert_map_path`): for each MoE layer in order the experts of each device.

    It takes the number of redundant experts from the file. Layers are counted without dense ones.
    """
    rows_LRs = _filled(placement, fill_empty).physical_to_logical_map.reshape(
        placement.num_layers, placement.num_ranks, placement.slots_per_rank
    )
    return {
        "moe_layer_count": placement.num_layers,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": placement.num_ranks,
                "device_list": [{"device_id": rank, "device_expert": held} for rank, held in enumerate(rows_Rs)],
            }
            for layer, rows_Rs in enumerate(rows_LRs.tolist())
        ],
    }


def export_tensorrt_llm(
    placement: Placement, *, layers: Sequence[int] | None = None, fill_empty: bool = False
) -> dict[str, Any]:
    """What TensorRT-LLM reads as YAML (`moe_config.load_balancer`): the expert of each slot by decoder layer.

    `layers` gives the decoder layer of each row; None counts from 0, for models without dense layers. The file names
    only them: MoE layers of a draft model need rows of their own. Slots are dealt to ranks in order, as here.
    `layer_updates_per_iter` 0 keeps the placement as it is; 1 and more let the engine change it while it serves.
    """
    rows_LS = _filled(placement, fill_empty).physical_to_logical_map
    named = _decoder_layers(placement, layers)
    return {
        "num_slots": placement.num_slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(zip(named, rows_LS.tolist(), strict=True)),
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
    """
    placement = _filled(placement, fill_empty)
    rows_LS = placement.physical_to_logical_map
    if layers is None and num_hidden_layers is None:
        return {"physical_to_logical_map": rows_LS.tolist()}
    named = _decoder_layers(placement, layers)
    total = max(named) + 1 if num_hidden_layers is None else num_hidden_layers
    if min(named) < 0 or max(named) >= total:
        raise ValueError(f"layers are {min(named)} to {max(named)}, expected 0 to {total - 1}")
    all_LS = np.tile(np.arange(placement.num_slots) % placement.num_experts, (total, 1))
    all_LS[named] = rows_LS
    return {"physical_to_logical_map": all_LS.tolist()}


def yaml_text(data: dict[str, Any]) -> str:
    """As TensorRT-LLM reads it, each layer's experts on one line."""
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=2**31)


def _decoder_layers(placement: Placement, layers: Sequence[int] | None) -> list[int]:
    named = list(range(placement.num_layers)) if layers is None else [int(layer) for layer in layers]
    if len(named) != placement.num_layers or len(set(named)) != len(named):
        raise ValueError(f"layers must name {placement.num_layers} different decoder layers, got {named}")
    return named


def _filled(placement: Placement, fill_empty: bool) -> Placement:
    placement = replace(placement, partial=False)  # raises if an expert is missing
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
