"""Bytes on a router's and on a shard's GPU, line by line.

D hidden size, K experts of a token, I expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.sizing.gpus import Gpu
from placement.sizing.model import SERVED_BYTES, Basis, ModelFacts

# A CUDA context with cuBLAS and NCCL workspaces: 0.5 GB of context on an H100, 0.3 to 0.6 GB beside torch's pool.
CONTEXT_BYTES = 1_000_000_000
GRAPH_BYTES = 500_000_000  # of vLLM's CUDA graphs, at their default sizes
DTYPE_BYTES = SERVED_BYTES  # activations travel and are computed in these too
PAIR_ROW_BYTES = 16  # header of a row: its number of experts, its place
PAIR_ENTRY_BYTES = 8  # an expert of a row: its id and its weight
ROWS_PER_DISPATCH = 2048


@dataclass(frozen=True)
class Line:
    """One use of a GPU's memory."""

    what: str
    nbytes: float
    basis: Basis
    how: str = ""


@dataclass(frozen=True)
class MemoryUse:
    """All uses of one GPU of a kind."""

    lines: tuple[Line, ...]

    @property
    def nbytes(self) -> float:
        return sum(line.nbytes for line in self.lines)

    def free_share(self, gpu: Gpu) -> float:
        """Share of the GPU's memory that nothing takes; negative if it does not fit."""
        return 1 - self.nbytes / gpu.memory_bytes


def pair_bytes(facts: ModelFacts, rows: int = ROWS_PER_DISPATCH) -> int:
    """Bytes of a pair's two buffers, filled: a request and a reply of `rows` rows (`experts.protocol.wire`)."""
    row = facts.hidden_size * DTYPE_BYTES
    return rows * (2 * row + PAIR_ROW_BYTES + facts.top_k * PAIR_ENTRY_BYTES)


def router_memory(
    facts: ModelFacts,
    kv_value_bytes: float,
    *,
    chunk: int,
    sequences: int,
    context: int,
    shards: int,
    workers: int = 1,
) -> MemoryUse:
    """One GPU of a router of `workers`: `sequences` of `context` tokens, steps of up to `chunk` tokens, a pair with
    each of `shards`.
    """
    sequence = _sequence_bytes(facts, context, kv_value_bytes, chunk, workers)
    part = f", 1/{workers} of them" if workers > 1 else ""
    basis = facts.basis if workers == 1 else "estimated"  # norms, gates and MLA's narrow projections are whole on each
    return MemoryUse(
        (
            Line("dense weights", facts.held_bytes("router") / workers, basis, f"all but routed experts{part}"),
            *_absorbed(facts, workers),
            *_mtp(facts, workers),
            Line("KV cache", sequences * sequence, "config", f"{sequences} sequences of {context} tokens"),
            Line(
                "activations", _router_activations(facts, chunk, sequences, workers), "estimated",
                f"steps of {chunk} tokens",
            ),
            Line("pairs", shards * pair_bytes(facts), "config", f"{shards} of {ROWS_PER_DISPATCH} rows, filled"),
            Line("CUDA context, graphs", CONTEXT_BYTES + GRAPH_BYTES, "estimated"),
        )
    )  # fmt: skip


def shard_memory(facts: ModelFacts, *, slots: int, pairs: int) -> MemoryUse:
    """One shard with `slots` slots in each MoE layer, and a pair with each worker of each router."""
    rows = ROWS_PER_DISPATCH
    return MemoryUse(
        (
            Line(
                "expert slots", slots * facts.expert_layers * facts.expert_bytes, facts.basis,
                f"{slots} slots x {facts.expert_layers} layers",
            ),
            Line("activations", _expert_activations(facts, rows), "estimated", f"messages of {rows} rows"),
            Line("pairs", pairs * pair_bytes(facts), "config", f"{pairs} of {rows} rows, filled"),
            Line("CUDA context", CONTEXT_BYTES, "estimated"),
        )
    )  # fmt: skip


def engine_memory(
    facts: ModelFacts, kv_value_bytes: float, *, gpus: int, chunk: int, sequences: int, context: int
) -> MemoryUse:
    """One of `gpus` GPUs of plain expert parallelism: dense weights and attention on each, experts divided."""
    experts = math.ceil(facts.num_experts / gpus)
    sequence = _sequence_bytes(facts, context, kv_value_bytes, chunk)
    activations = max(_router_activations(facts, chunk, sequences), _expert_activations(facts, chunk))
    return MemoryUse(
        (
            Line("dense weights", facts.held_bytes("router"), facts.basis),
            Line(
                "experts",
                experts * facts.expert_layers * facts.engine_expert_bytes,
                facts.basis,
                f"{experts} of each layer",
            ),
            *_absorbed(facts),
            *_mtp(facts),
            Line("KV cache", sequences * sequence, "config", f"{sequences} sequences of {context} tokens"),
            Line("activations", activations, "estimated"),
            Line("all-to-all buffers", 2 * pair_bytes(facts, chunk), "estimated"),
            Line("CUDA context, graphs", CONTEXT_BYTES + GRAPH_BYTES, "estimated"),
        )
    )


def _absorbed(facts: ModelFacts, workers: int = 1) -> list[Line]:
    if not facts.absorbed_values:
        return []
    nbytes = facts.absorbed_values * DTYPE_BYTES / workers
    return [Line("absorbed MLA projections", nbytes, "config", "vLLM's copies")]


def _mtp(facts: ModelFacts, workers: int = 1) -> list[Line]:
    if facts.mtp_router_bytes is None:
        return []
    nbytes = facts.mtp_router_bytes / workers
    return [Line("multi-token prediction", nbytes, facts.basis, "its layer but for routed experts")]


def _sequence_bytes(facts: ModelFacts, context: int, value_bytes: float, chunk: int, workers: int = 1) -> float:
    """Bytes of a sequence's KV cache; a layer for multi-token prediction has attention as the others do."""
    nbytes = facts.kv_sequence_bytes(context, value_bytes, in_flight=chunk, workers=workers)
    return nbytes if facts.mtp_router_bytes is None else nbytes * (facts.num_layers + 1) / facts.num_layers


def _router_activations(facts: ModelFacts, chunk: int, sequences: int, workers: int = 1) -> float:
    """The widest moment of a step: residual, hidden states, projections and a gated MLP, or the logits in float32."""
    widest = max((t.rows for t in facts.tensors if t.side == "router" and t.kind == "linear"), default=0) / workers
    tokens = chunk * DTYPE_BYTES * (6 * facts.hidden_size + 3 * widest)
    logits = min(sequences, 1024) * facts.vocab_size * (DTYPE_BYTES + 2 * 4)
    return tokens + logits


def _expert_activations(facts: ModelFacts, rows: int) -> float:
    """Every row at its K experts: gate and up, their product, and the sums in float32."""
    return rows * facts.top_k * (3 * facts.expert_width * DTYPE_BYTES + facts.hidden_size * 4)
