"""A placement in the formats of other engines.

L layers, S slots, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from placement.tables import Placement

FORMATS = ("vllm", "vllm-ascend", "sglang")


def export_placement(placement: Placement, format: str) -> dict[str, Any]:
    """JSON values in the format of an engine. Raises ValueError on an unknown one.

    `sglang`: what `--init-expert-location` takes. `vllm`: the three tables of its EPLB state, by their names there.
    `vllm-ascend`: its expert map file, device by device. None of them knows empty slots: an empty slot gets a further
    copy of an expert that its rank lacks, the one with fewest copies.
    """
    if format not in FORMATS:
        raise ValueError(f"export format is {format!r}, expected one of {', '.join(FORMATS)}")
    full = fill_slots(placement)
    map_LS = full.physical_to_logical_map
    if format == "sglang":
        return {"physical_to_logical_map": map_LS.tolist()}
    if format == "vllm":
        return {
            "physical_to_logical_map": map_LS.tolist(),
            "logical_to_physical_map": full.logical_to_physical_map.tolist(),
            "logical_replica_count": full.logical_replica_count.tolist(),
            "num_redundant_experts": full.num_slots - full.num_experts,
        }
    return {
        "moe_layer_count": full.num_layers,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": full.num_ranks,
                "device_list": [
                    {"device_id": rank, "device_expert": full.experts_of_rank(rank)[layer].tolist()}
                    for rank in range(full.num_ranks)
                ],
            }
            for layer in range(full.num_layers)
        ],
    }


def fill_slots(placement: Placement) -> Placement:
    """The placement with a further copy of some expert in every empty slot."""
    map_LS = placement.physical_to_logical_map.copy()
    for layer, slot in np.argwhere(map_LS < 0):
        rank = slot // placement.slots_per_rank
        here = map_LS[layer, rank * placement.slots_per_rank : (rank + 1) * placement.slots_per_rank]
        count_E = np.bincount(map_LS[layer][map_LS[layer] >= 0], minlength=placement.num_experts)
        lacking = np.setdiff1d(np.arange(placement.num_experts), here)
        choice = lacking if len(lacking) else np.arange(placement.num_experts)
        map_LS[layer, slot] = choice[np.argmin(count_E[choice])]
    return Placement(placement.num_ranks, placement.num_nodes, placement.num_experts, map_LS)
