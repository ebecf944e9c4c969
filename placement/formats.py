"""Other engines' formats: placements out to vLLM and SGLang, routing traces in from them.

L layers, E experts, S slots, M most replicas of an expert, T tokens, K experts of one token.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placement.importers import FORMATS, UNREADABLE, from_sglang, from_vllm, load_trace, unusable
from placement.tables import EMPTY, Placement
from placement.trace import ActivationTrace, TraceError, merge_traces

TRACE_SUFFIXES = (".pt", ".npz", ".npy", ".json", ".jsonl")


def export_vllm(placement: Placement, *, fill_empty: bool = False) -> dict[str, Any]:
    """The placement under the names and in the shapes of vLLM's `EplbState`, as plain JSON values.

    `physical_to_logical_map` [L, S], `logical_to_physical_map` [L, E, M] padded with -1, `logical_replica_count`
    [L, E], one row for each MoE layer; beside them the settings that an engine needs to have as many slots. vLLM 0.32
    reads no map at start: it is for an EPLB policy that returns it. See `export_sglang` for empty slots.
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
    """What SGLang's `--init-expert-location` reads as JSON: `physical_to_logical_map` alone, any other key fails there.

    SGLang wants a row for each decoder layer: `layers` names the decoder layer of each row, `num_hidden_layers` how
    many there are; the others get experts in order, which nothing reads. Start it with `--ep-num-redundant-experts`
    S - E. Its slots cannot be empty: a placement with empty slots raises ValueError, or with `fill_empty` repeats an
    expert of the same rank, which changes no fan-out, but draws load there, as engines split it evenly over replicas.
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
            f"layer {empty[0][0]}: slot {empty[0][1]} is empty ({len(empty)} in all), the engine needs an "
            "expert in each; plan without empty slots or fill them (fill_empty)"
        )
    filled_LRs = map_LS.reshape(placement.num_layers, placement.num_ranks, -1).copy()
    for layer, slot in empty.tolist():
        rank, local = divmod(slot, placement.slots_per_rank)
        held = placement.experts_of_rank(rank)[layer]
        held = held[held >= 0]
        # A rank without any expert takes one of the layer's.
        filled_LRs[layer, rank, local] = held[local % len(held)] if len(held) else slot % placement.num_experts
    return Placement(placement.num_ranks, placement.num_nodes, placement.num_experts, filled_LRs.reshape(map_LS.shape))


def import_trace(path: str | Path, kind: str = "auto", num_experts: int | None = None) -> ActivationTrace:
    """Read another program's routing trace; `kind` is one of `placement.importers.FORMATS`.

    - `vllm`: `routed_experts` [T, L, K] as .npy, as .npz with one array a request, or the API's responses as .json or
      .jsonl, in which it is base64 of an .npy. The API gives no expert count: pass `num_experts`.
    - `sglang`: the recorder's dumps, `.pt` read without torch, or the same dictionary as .json; per token, per pass or
      counts. Ids in it are physical and are translated by its map.
    - `olmoe`: .npz with `topk_ids`, `domain`, `domains`, `expert_load`, `num_experts`, `layers`.
    - `expertmesh`: this project's .npz. `auto` tells them apart by content.

    A folder stands for all such files in it, merged, as SGLang writes one for each rank. Layers in which no token
    picked an expert (dense ones) are left out; the trace's `layers` are those kept. Raises TraceError in one line,
    where a file says another number of experts than `num_experts` too.
    """
    path = Path(path)
    if kind not in FORMATS:
        raise TraceError(f"trace format is {kind!r}, expected one of {', '.join(FORMATS)}")
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in TRACE_SUFFIXES)
        if not files:
            raise TraceError(f"{path}: no traces in the folder; they end in {', '.join(TRACE_SUFFIXES)}")
        trace = merge_traces([_read(each, kind, num_experts) for each in files])
    else:
        trace = _read(path, kind, num_experts)
    if num_experts is not None and trace.num_experts != num_experts:
        raise TraceError(f"{path}: the trace is of {trace.num_experts} experts, num_experts is {num_experts}")
    return without_idle_layers(trace)


def without_idle_layers(trace: ActivationTrace) -> ActivationTrace:
    """The trace without layers in which no expert was picked, as dense layers show in other engines' records."""
    picked_L = (trace.topk_ids >= 0).any((0, 2))
    if trace.counts is not None:
        picked_L |= trace.counts.any(1)
    if picked_L.all():
        return trace
    if not picked_L.any():
        raise TraceError("the trace is empty: no expert was picked in any layer")
    return ActivationTrace(
        trace.topk_ids[:, picked_L],
        trace.num_experts,
        tuple(np.array(trace.layers)[picked_L].tolist()),
        trace.domain,
        trace.domains,
        None if trace.counts is None else trace.counts[picked_L],
        trace.source,
    )


def _read(path: Path, kind: str, num_experts: int | None) -> ActivationTrace:
    if path.suffix not in (".json", ".jsonl"):
        return load_trace(path, kind, num_experts)
    try:
        text = path.read_text()
        data = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else (
            json.loads(text)
        )  # fmt: skip
        if isinstance(data, dict) and (kind == "sglang" or "logical_count" in data or "records" in data):
            return from_sglang(data, num_experts, str(path))
        found = list(_routed_experts(data))
        if not found:
            raise TraceError("no `routed_experts` and no expert-distribution dump in it")
        return from_vllm(found, num_experts, str(path))
    except FileNotFoundError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except UNREADABLE as error:
        raise unusable(path, error) from None


def _routed_experts(data: Any) -> Iterator[np.ndarray]:
    """Every `routed_experts` in nested JSON, whatever stands around it; null ones are skipped."""
    if isinstance(data, list):
        for each in data:
            yield from _routed_experts(each)
    elif isinstance(data, dict):
        for key, value in data.items():
            if key != "routed_experts":
                yield from _routed_experts(value)
            elif isinstance(value, str):
                try:
                    yield np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
                except (binascii.Error, ValueError, EOFError) as error:
                    raise TraceError(f"routed_experts is no base64 of an .npy: {error}") from None
            elif value is not None:
                yield np.array(value)
