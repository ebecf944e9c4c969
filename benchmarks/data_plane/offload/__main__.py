"""What a shard with fewer resident experts costs, with and without prefetch, beside one with all of them resident.

    python -m benchmarks.data_plane.offload [--quick] [--model tiny|bench]

One shard process for each case, all with every expert of the model (float32, native kernel), and a router's client that
waits COMPUTE_S before each layer in place of attention. Routing, activations and hints are those of the model
while it generates from real prompts. Cases take turns; medians of tokens/s and of the ratio to the shard with all
resident and without offloading.

    limit   copies are limited so that what a layer misses at half resident without prefetch takes half of COMPUTE_S
    cgroup  no such limit, but a memory cgroup with room for half of the experts and a little, so that others come
            from the disk; a shard that offloads, and one with its experts in a mapped file (`shard.MappedKernel`)

Then the recall of a layer's experts as they would be fetched early, as many as the layer uses: the most frequent ones,
those that followed so far (`Transitions`), those of the layer's gate applied to the layer before. OLMoE's trace has
layers 0, 7 and 15 alone, so it tells only how little follows across seven layers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, TINY_MODEL, bench_model, median, print_table, real_prompts, save
from benchmarks.data_plane.offload.shard import serve
from benchmarks.memory_group import MemoryGroup, memory_group, why_no_group
from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.mesh_client import MeshClient
from experts.kernels.offload.transitions import Transitions
from experts.protocol.membership import Membership
from experts.protocol.settings import OffloadSettings, RouterSettings, ShardSettings
from experts.protocol.wire import hint_words
from placement.placement import Placement

COMPUTE_S = 0.005
STREAMS = 16
LEAST_SLACK_BYTES = 2 << 20  # what is on its way from the disk, stacks, buffers of pairs
FRACTIONS = (0.75, 0.5, 0.25)
OLMOE = ROOT / "benchmarks" / "data" / "olmoe-1b-7b" / "train.npz"


@dataclass
class Decode:
    """What the model computed while STREAMS streams generated: by layer, [steps, streams, ...]."""

    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    next_ids: list[torch.Tensor]  # of the next layer's gate; none for the last layer


@dataclass(frozen=True)
class Case:
    """How a shard has its experts. `limited`: by a memory cgroup; without `offload` they are in a mapped file then."""

    how: str
    resident: float
    offload: OffloadSettings | None
    limited: bool = False


def decode(path: Path, steps: int) -> Decode:
    """Generate with transformers and note the gates' inputs."""
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    blocks = [layer.mlp for layer in model.model.layers]
    seen: list[list[torch.Tensor]] = [[] for _ in blocks]
    for noted, block in zip(seen, blocks, strict=True):
        block.register_forward_pre_hook(lambda _, given, noted=noted: noted.append(given[0][:, -1].detach()))
    with torch.inference_mode():
        model.generate(torch.tensor(real_prompts(STREAMS, 24)), max_new_tokens=steps + 1, min_new_tokens=steps + 1)
        x = [torch.stack(noted[1 : steps + 1]) for noted in seen]
        gates, top_k = [block.gate.weight for block in blocks], model.config.num_experts_per_tok
        picked = [(x_SBD @ gate.T).softmax(-1).topk(top_k) for x_SBD, gate in zip(x, gates, strict=True)]
        following = [(x_SBD @ gate.T).topk(top_k).indices for x_SBD, gate in zip(x, gates[1:], strict=False)]
        weights = [each.values / each.values.sum(-1, keepdim=True) for each in picked]
    return Decode(x, [each.indices.int() for each in picked], weights, following)


def misses_of_lru(trace: Decode, batch: int, places: int) -> float:
    """Misses of a layer's call, once the places are full."""
    counted = calls = 0
    for ids_SBK in trace.ids:
        resident: OrderedDict[int, None] = OrderedDict()
        for step, ids_BK in enumerate(ids_SBK[:, :batch]):
            for expert in np.unique(ids_BK.numpy()).tolist():
                counted += step > 4 and expert not in resident
                resident[expert] = None
                resident.move_to_end(expert)
            calls += step > 4
            while len(resident) > places:
                resident.popitem(last=False)
    return counted / max(calls, 1)


@contextmanager
def running(
    case: Case, path: Path, placement: Placement, expert_bytes: int
) -> Iterator[tuple[MeshClient, Connection, MemoryGroup | None]]:
    """A shard, a router's client that is connected to it, and the group that limits the shard if one does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.data_plane.offload.shard"])
    ours, theirs = context.Pipe()
    settings = ShardSettings(model_path=str(path), dtype="float32", kernel="native", offload=case.offload)
    mapped = case.limited and case.offload is None
    process = context.Process(target=serve, args=(settings.model_dump(), placement.to_json(), theirs, mapped))
    process.start()
    checkpoint = ExpertCheckpoint.open(path)
    spec = checkpoint.spec
    shape = LayerShape(spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size, torch.float32)
    client = MeshClient(RouterSettings(model_path=str(path), trace_tokens=0), checkpoint, shape, "cpu")
    with memory_group() if case.limited else nullcontext() as group:
        try:
            if group is not None and process.pid is not None:
                group.move(process.pid)
            ours.send(True)
            client.apply_membership(Membership(1, placement, (ours.recv(),)))
            if group is not None:
                half_bytes = spec.num_layers * spec.num_experts * expert_bytes // 2
                # Without a mapped file they are among what the process keeps.
                group.limit(group.kept_bytes + mapped * half_bytes + max(half_bytes // 32, LEAST_SLACK_BYTES))
            yield client, ours, group
        finally:
            client.close()
            ours.send(False)
            process.join()


def tokens_per_s(client: MeshClient, trace: Decode, batch: int) -> float:
    """Replay all steps."""
    mover, steps, layers = client.dispatcher.mover, len(trace.x[0]), len(trace.x)
    nothing = hint_words(np.empty(0, np.int64))
    start_s = time.perf_counter()
    for step in range(steps):
        for layer in range(layers):
            time.sleep(COMPUTE_S)
            if mover.wants_hints:
                told = layer + 1 < layers
                mover.hint(hint_words(trace.next_ids[layer][step, :batch].flatten().numpy()) if told else nothing)
            x_TD, weights, ids = (part[layer][step, :batch] for part in (trace.x, trace.weights, trace.ids))
            client.finish(client.begin(layer, x_TD.contiguous(), weights.contiguous(), ids.contiguous(), record=False))
    return batch * steps / (time.perf_counter() - start_s)


def cases(rate: float, fractions: Sequence[float]) -> list[Case]:
    """The first one has everything in memory."""

    def offload(resident: float, prefetch: bool, limit: float | None) -> OffloadSettings:
        return OffloadSettings(resident_fraction=resident, prefetch=prefetch, max_copy_bytes_per_s=limit)

    found = [Case("whole", 1.0, None), Case("limit", 1.0, offload(1.0, True, rate))]
    found += [Case("limit", each, offload(each, early, rate)) for each in fractions for early in (False, True)]
    found += [Case("cgroup", 0.5, offload(0.5, early, None), limited=True) for early in (False, True)]
    return [*found, Case("cgroup", 0.5, None, limited=True)]


def measure(trace: Decode, path: Path, batch: int, rounds: int) -> list[dict[str, Any]]:
    """All cases in turn."""
    spec = ExpertCheckpoint.open(path).spec
    placement = Placement.linear(spec.num_layers, spec.num_experts, 1)
    expert_bytes = 3 * spec.hidden_size * spec.intermediate_size * 4
    rate = max(misses_of_lru(trace, batch, spec.num_experts // 2), 0.5) * expert_bytes / (COMPUTE_S / 2)
    all_cases = cases(rate, FRACTIONS if path == TINY_MODEL else (0.5,))
    if without := why_no_group():
        print(f"left out: cgroup ({without})")
        all_cases = [case for case in all_cases if not case.limited]
    found: list[list[float]] = [[] for _ in all_cases]
    with ExitStack() as stack:
        shards = [stack.enter_context(running(each, path, placement, expert_bytes)) for each in all_cases]
        for number in range(rounds + 1):  # the first one warms up
            for speeds, (client, *_) in zip(found, shards, strict=True):
                speed = tokens_per_s(client, trace, batch)
                if number:
                    speeds.append(speed)
        statuses = []
        for _, pipe, _ in shards:
            pipe.send(True)
            statuses.append(pipe.recv().offload)
        limited = [None if group is None else group.times_limited for _, _, group in shards]
    rows = []
    for case, speeds, told, times in zip(all_cases, found, statuses, limited, strict=True):
        rows.append(
            {
                "batch": batch,
                "how": case.how,
                "resident": case.resident,
                "prefetch": told is not None and case.offload is not None and case.offload.prefetch,
                "tokens_per_s": median(speeds),
                "of_whole": median(mine / theirs for mine, theirs in zip(speeds, found[0], strict=True)),
                "hit_rate": None if told is None else told.hits / (told.hits + told.misses),
                "prefetches_wasted": None if not told else told.prefetches_wasted / max(told.prefetched, 1),
                "mb_per_s": rate / 1e6 if case.how == "limit" else None,
                "times_limited": times,
            }
        )
    return rows


def recall_of_gate(trace: Decode, layer: int) -> float:
    """Of the next layer's experts, those its gate names a layer early."""
    pairs = zip(trace.next_ids[layer].flatten(0, 1).tolist(), trace.ids[layer + 1].flatten(0, 1).tolist(), strict=True)
    return float(np.mean([len(set(told) & set(used)) / len(used) for told, used in pairs]))


def recalls(ids_NLK: np.ndarray, num_experts: int) -> list[tuple[float, float]]:
    """For each layer but the first: recall by frequency and by transitions, over the last two thirds of N tokens."""
    num_layers, top_k = ids_NLK.shape[1:]
    transitions = Transitions(num_layers, num_experts)
    counts_LE = np.zeros((num_layers, num_experts), np.int64)
    found: list[list[tuple[float, float]]] = [[] for _ in range(num_layers)]
    for number, ids_LK in enumerate(ids_NLK):
        for layer in range(num_layers):
            used = np.sort(ids_LK[layer])
            if layer and number > len(ids_NLK) // 3:
                frequent = np.argsort(-counts_LE[layer])[:top_k]
                likely = transitions.likely(layer - 1, np.sort(ids_LK[layer - 1]), 0.0)[:top_k]
                found[layer].append((np.isin(used, frequent).mean(), np.isin(used, likely).mean()))
            transitions.note(layer, used)
            counts_LE[layer, used] += 1
    return [(float(a), float(b)) for a, b in (np.mean(each, 0) for each in found[1:])]


def main() -> None:
    """Print and save both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs: does it work, not how fast")
    parser.add_argument("--model", choices=["tiny", "bench"], default="tiny", help="bench: half resident alone")
    args = parser.parse_args()
    os.environ.setdefault("EXPERTMESH_SECRET", secrets.token_hex(32))
    torch.set_num_threads(1)
    path = TINY_MODEL if args.model == "tiny" else bench_model()
    trace = decode(path, steps=12 if args.quick else 24)
    spec = ExpertCheckpoint.open(path).spec
    rounds = 1 if args.quick else 5
    rows = [row for batch in (1, STREAMS) for row in measure(trace, path, batch, rounds)]
    header = list(rows[0])
    print_table("One shard", header, [["-" if row[name] is None else row[name] for name in header] for row in rows])
    ids_NLK = torch.stack(trace.ids, 2).flatten(0, 1).numpy()
    told = [
        {"next": f"{args.model} {layer + 1}", "frequency": a, "transitions": b, "gate": recall_of_gate(trace, layer)}
        for layer, (a, b) in enumerate(recalls(ids_NLK, spec.num_experts))
    ]
    olmoe = np.load(OLMOE)
    tokens_NLK = olmoe["topk_ids"][np.random.default_rng(0).permutation(len(olmoe["topk_ids"]))[:4000]]
    for layer, (a, b) in zip(olmoe["layers"][1:].tolist(), recalls(tokens_NLK, int(olmoe["num_experts"])), strict=True):
        told.append({"next": f"OLMoE {layer}", "frequency": a, "transitions": b, "gate": None})
    print_table("Recall", list(told[0]), [["-" if value is None else value for value in row.values()] for row in told])
    save("offload", {"model": args.model, "compute_s": COMPUTE_S, "shards": rows, "recall": told})


if __name__ == "__main__":
    main()
