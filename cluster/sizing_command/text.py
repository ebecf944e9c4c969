"""The answer for people."""

from __future__ import annotations

from collections.abc import Iterator

from placement.sizing.gpus import Gpu
from placement.sizing.memory import MemoryUse
from placement.sizing.plan import Engines, Layout
from placement.sizing.sizing import Sizing, shares


def lines_of(sizing: Sizing) -> Iterator[str]:
    """The whole answer, line by line."""
    best, demand = sizing.layout, sizing.demand
    yield from _model(sizing)
    yield from _best(sizing)
    yield from _memory("each GPU of a router" if demand.router_gpus > 1 else "a router", best.router, sizing.gpu)
    yield from _memory("a shard", sizing.layout.shard, sizing.gpu)
    yield from _layouts(sizing)
    yield from _plain(sizing)
    notes = [*sizing.facts.notes, *([sizing.gpu.notes] if sizing.gpu.notes else [])]
    if notes:
        yield ""
        yield from (f"note: {note}" for note in notes)
    yield ""
    yield "headers, config: exact. nominal: data sheets. estimated: rooflines and assumed costs (docs/sizing.md)."


def _model(sizing: Sizing) -> Iterator[str]:
    facts = sizing.facts
    served = facts.mtp_router_bytes is not None
    total = facts.parameters()
    yield (
        f"{facts.name}: {total / 1e9:.1f} B parameters, {facts.active_parameters / 1e9:.1f} B for a token, "
        f"{facts.moe_layers} layers{' and one for MTP' if served else ''} of {facts.num_experts} experts, "
        f"{facts.top_k} for a token  [config]"
    )
    yield (
        f"  in 16 bits {2 * total / 1e9:.1f} GB, in 8 {total / 1e9:.1f} GB, in 4 {total / 2e9:.1f} GB (values alone); "
        f"stored as {facts.stored.form or f'floats of {8 * facts.stored.float_bytes} bits'}:"
    )
    for side, whose in (("router", "routers"), ("experts", "shards"), ("unused", "MTP" if served else "neither")):
        parts = [(part, nbytes) for part, of, nbytes in facts.parts() if of == side]
        if parts:
            told = ", ".join(f"{part} {_size(nbytes)}" for part, nbytes in parts)
            whole = _size(sum(nbytes for _, nbytes in parts))
            yield f"  {whose:8s}{whole:>10s}  [{facts.basis}]  {told}"
    yield (
        f"  KV cache {facts.kv_token_bytes(sizing.demand.kv_value_bytes) / 1e3:.1f} kB a token  [config]  {facts.kinds}"
    )


def _best(sizing: Sizing) -> Iterator[str]:
    best, demand = sizing.layout, sizing.demand
    point = best.point
    yield ""
    yield (
        f"{demand.rate:g} requests/s of {demand.isl} + {demand.osl} tokens, at most {demand.tpot_ms:g} ms a token and "
        f"{demand.ttft_ms:g} ms to the first:"
    )
    several = f"{best.services} services, each of " if best.services > 1 else ""
    each = f" of {best.router_gpus} GPUs" if best.router_gpus > 1 else ""
    yield (
        f"  {best.gpus} x {sizing.gpu.title}: {several}{best.routers} router(s){each} and {best.shards} shards with "
        f"{best.slots} slots a layer"
        + (f", {best.replicas} replicas of each expert" if best.replicas > 1 else "")
        + "  [estimated]"
    )
    loss = ""
    if best.degraded_tpot_s is not None:
        loss = f", {1e3 * best.degraded_tpot_s:.1f} with {demand.lost_shards} lost shard(s)"
    yield (
        f"  {1e3 * point.tpot_s:.1f} ms a token{loss}; {1e3 * point.ttft_s:.0f} ms to the first; longest step "
        f"{1e3 * point.longest_step_s:.1f} ms  [estimated]"
    )
    yield (
        f"  {point.sequences:.1f} sequences on a router (room for {point.peak_sequences}), steps of up to {best.chunk} "
        f"tokens; carries up to {sizing.carries:.3g} requests/s  [estimated]"
    )
    yield (
        f"  {sizing.answered_per_s:.0f} tokens/s answered, {sizing.answered_per_s / best.gpus:.1f} a GPU, "
        f"{1 / point.tpot_s:.1f} a user  [estimated]" + _price(sizing, best.gpus)
    )
    step = ", ".join(f"{name} {share:.0%}" for name, share in shares(point.step).items() if share >= 0.005)
    yield f"  a step: {step}  [estimated]"


def _memory(whose: str, memory: MemoryUse, gpu: Gpu) -> Iterator[str]:
    yield ""
    yield f"memory of {whose}"
    for line in memory.lines:
        yield f"  {line.what:26s}{_size(line.nbytes):>10s}  [{line.basis}]{'  ' + line.how if line.how else ''}"
    yield (
        f"  {'together':26s}{_size(memory.nbytes):>10s}  of {_size(gpu.memory_bytes)}, "
        f"{memory.free_share(gpu):.0%} free"
    )


def _layouts(sizing: Sizing) -> Iterator[str]:
    if len(sizing.layouts) < 2:
        return
    yield ""
    yield "  GPUs  services  routers  shards  slots  ms/token  ms to first  tokens/s/GPU  tokens/s/user  [estimated]"
    yield from (_row(sizing, layout) for layout in sizing.layouts)


def _row(sizing: Sizing, layout: Layout) -> str:
    point = layout.point
    return (
        f"  {layout.gpus:4d}{layout.services:10d}{layout.routers:9d}{layout.shards:8d}{layout.slots:7d}"
        f"{1e3 * point.tpot_s:10.1f}{1e3 * point.ttft_s:13.0f}{sizing.answered_per_s / layout.gpus:14.1f}"
        f"{1 / point.tpot_s:15.1f}"
    )


def _plain(sizing: Sizing) -> Iterator[str]:
    verdict = sizing.verdict
    yield ""
    yield "plain vLLM with expert parallelism, attention on every GPU"
    yield f"  fewest GPUs: {_engines(sizing, sizing.engines)}"
    yield f"  on {sizing.layout.gpus} GPUs:  {_engines(sizing, sizing.engines_equal)}"
    yield f"  the split {'pays' if verdict.pays else 'does not pay'} here: {'; '.join(verdict.why)}  [estimated]"


def _engines(sizing: Sizing, engines: Engines | None) -> str:
    if engines is None:
        return f"none up to {sizing.demand.max_gpus} serves this"
    several = f"{engines.count} engines of {engines.each} GPUs" if engines.count > 1 else "one engine"
    return (
        f"{engines.gpus} ({several}), {1e3 * engines.point.tpot_s:.1f} ms a token, "
        f"{1e3 * engines.point.ttft_s:.0f} ms to the first  [estimated]{_price(sizing, engines.gpus)}"
    )


def _price(sizing: Sizing, gpus: int) -> str:
    hourly, million = sizing.price_per_hour(gpus), sizing.price_per_million(gpus)
    return "" if hourly is None else f"; {hourly:.2f} an hour, {million:.2f} a million tokens answered"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
