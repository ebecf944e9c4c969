"""What is told of a model, as JSON and as a table, without numba: `expertmesh size --models` needs no planner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from placement.sizing.model import Basis, ModelFacts


def figure(value: float | None, unit: str, basis: Basis) -> dict[str, Any]:
    """One figure."""
    return {"value": round(value, 6) if isinstance(value, float) else value, "unit": unit, "basis": basis}


def model_as_json(facts: ModelFacts, kv_value_bytes: float = 2.0) -> dict[str, Any]:
    """A model's sizes."""
    return {
        "name": facts.name,
        "model_type": facts.model_type,
        "parameters": figure(facts.parameters(), "", "config"),
        "active_parameters": figure(facts.active_parameters, "", "config"),
        "experts": {"layers": facts.expert_layers, "of_each": facts.num_experts, "for_a_token": facts.top_k},
        "router_weights": figure(facts.weight_bytes("router"), "bytes", facts.basis),
        "expert_weights": figure(facts.weight_bytes("experts"), "bytes", facts.basis),
        "parts": [
            {"part": part, "side": side, **figure(nbytes, "bytes", facts.basis)} for part, side, nbytes in facts.parts()
        ],
        "stored": facts.stored.form or f"floats of {8 * facts.stored.float_bytes} bits",
        "attention": facts.kinds,
        "kv_cache_of_a_token": figure(facts.kv_token_bytes(kv_value_bytes), "bytes", "config"),
        "notes": list(facts.notes),
    }


def table_of(models: Iterable[ModelFacts]) -> Iterator[str]:
    """One row for each model: what guides of this field print, what the checkpoint takes, and how that splits."""
    yield (
        f"{'name':19s}{'parameters':>12s}{'active':>9s}{'16 bits':>10s}{'8 bits':>10s}{'stored':>10s}{'router':>9s}"
        f"{'experts':>10s}{'KV a token':>12s}  stored as, attention"
    )
    for facts in models:
        total = facts.parameters()
        router, experts = facts.weight_bytes("router"), facts.weight_bytes("experts")
        form = facts.stored.form or f"{8 * facts.stored.float_bytes} bits"
        yield (
            f"{facts.name:19s}{total / 1e9:10.1f} B{facts.active_parameters / 1e9:7.1f} B{2 * total / 1e9:7.1f} GB"
            f"{total / 1e9:7.1f} GB{(router + experts) / 1e9:7.1f} GB{router / 1e9:6.1f} GB{experts / 1e9:7.1f} GB"
            f"{facts.kv_token_bytes() / 1e3:9.1f} kB  {form}, {facts.kinds}"
        )
