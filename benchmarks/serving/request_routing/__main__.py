"""The tiny model's four domains before two routers: who has the fewest requests, by prefixes, by expert signature.

    python -m benchmarks.serving.request_routing [--quick] [--rounds 3] [--streams 32]

All ways stand over the same two shards, as applications of one Ray cluster with two routers of one thread each, and
take turns: those not asked are idle. Requests ask for `--tokens` tokens; each stream sends one after another, with
prompts in random order. Prompts of the turns are others than those that are sent before to warm up. Distinct experts
are the routers' own counts, of the steps of a turn that only generate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import TINY_MODEL, median, print_table, save
from benchmarks.serving.service import Service
from cluster.haproxy_guard import HAProxyGuard
from placement.traces.profile import read_prompts

MODEL, WATCH_S = "tiny-moe", 600.0
PREFIX = "ray.serve.llm.request_router.PrefixCacheAffinityRouter"
SIDES = {"fewest requests": "llm", "by prefixes": "prefixes", "by signature": "signatures"}
WARM_REQUESTS = 384  # of each side, before the first turn


class ThreeSides(Service):
    """The tiny service with two shards, and two routers for each side."""

    def __init__(self, folder: Path, max_lead: int) -> None:
        super().__init__(folder, "tiny-pools.yaml")
        applications = self._config["applications"]
        plain = next(app for app in applications if app["name"] == "llm")
        del plain["args"]["pools"]
        plain["args"]["routers"]["count"] = 2
        plain["args"]["routers"]["engine_kwargs"] |= {"max_num_seqs": 64}
        for name in list(SIDES.values())[1:]:
            side = copy.deepcopy(plain)
            side |= {"name": name, "route_prefix": f"/{name}"}
            routers = side["args"]["routers"]
            if name == "prefixes":
                routers["deployment_config"]["request_router_config"] = {
                    "request_router_class": PREFIX,
                    "request_router_kwargs": {"imbalanced_threshold": max_lead},
                }
            else:
                routers["expert_signatures"] = {"max_lead": max_lead, "report_s": 1.0}
            applications.append(side)


def url_of(service: Service, side: str) -> str:
    """Where a side takes completions."""
    name = SIDES[side]
    return f"{service.url}{'' if name == 'llm' else f'/{name}'}/v1/completions"


async def _send(url: str, prompts: Iterator[str], streams: int, tokens: int, until: Any) -> list[float]:
    """Requests on `streams` streams while `until()` is false; the times of all tokens, on time.monotonic()."""
    times: list[float] = []

    async def stream(session: aiohttp.ClientSession) -> None:
        while not until():
            body = {"model": MODEL, "prompt": next(prompts), "max_tokens": tokens, "temperature": 0}
            async with session.post(url, json={**body, "stream": True, "ignore_eos": True}) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data:") and b'"choices"' in line:
                        times.append(time.monotonic())

    limits = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(stream(session) for _ in range(streams)))
    return times


def shuffled(texts: list[str], seed: int) -> Iterator[str]:
    """All of them in random order, again and again."""
    order = random.Random(seed)
    while True:
        yield from order.sample(texts, len(texts))


def lives(side: str) -> dict[str, Any]:
    """What each router of a side shows, by id; it goes on counting the experts of steps."""
    from ray import serve

    handle = serve.get_deployment_handle("Router", SIDES[side])
    return {live.status.router_id: live for live in handle.broadcast("mesh_live", WATCH_S).results(timeout_s=60)}


def measure(service: Service, side: str, texts: list[str], args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One turn of one side."""
    begin_s = time.monotonic()
    end_s = begin_s + args.seconds
    sending = _send(
        url_of(service, side), shuffled(texts, seed), args.streams, args.tokens, lambda: time.monotonic() > end_s
    )
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(asyncio.run, sending)
        time.sleep(0.2 * args.seconds)  # all streams have begun
        before, from_s = lives(side), time.monotonic()
        time.sleep(max(0.0, end_s - time.monotonic()))
        after, to_s = lives(side), time.monotonic()
        inside = sum(from_s <= at_s < to_s for at_s in sent.result())
    grown = {
        key: [after[name].loads[key] - before[name].loads[key] for name in after]
        for key in ("steps", "rows", "tokens", "activated")
    }
    steps, layers = sum(grown["steps"]), len(next(iter(after.values())).loads["layers"])
    return {
        "tokens_per_s": inside / (to_s - from_s),
        "experts_a_step": sum(grown["activated"]) / steps / layers,
        "rows_a_step": sum(grown["rows"]) / steps,
        "busier_share": max(grown["tokens"]) / sum(grown["tokens"]),
    }


def main() -> None:
    """Print the table and write bench-results/request_routing.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn")
    parser.add_argument("--max-lead", type=int, default=8)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 5.0
    known, unseen = (
        [str(prompt.text) for prompt in read_prompts(TINY_MODEL / f"{name}.jsonl")]
        for name in ("prompts", "prompts-unseen")
    )
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        # Short: the paths of Unix sockets below it may have 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)))
        stack.callback(HAProxyGuard(folder).close)
        service = stack.enter_context(ThreeSides(folder, args.max_lead).running())
        for side, name in SIDES.items():
            service.wait_for(name, "RUNNING", lambda: None)
            sent = itertools.count()
            asyncio.run(
                _send(url_of(service, side), shuffled(known, 0), 16, 8, lambda s=sent: next(s) >= WARM_REQUESTS)
            )
        for number in range(args.rounds):
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                found[side].append(measure(service, side, unseen, args, number))
                print(f"round {number}, {side}: {found[side][-1]}", flush=True)
    keys = list(found[next(iter(SIDES))][0])
    table = [[side, *(median(turn[key] for turn in found[side]) for key in keys)] for side in SIDES]
    print_table(
        f"{args.streams} streams of {args.tokens} tokens, four domains, two routers, medians", ["side", *keys], table
    )
    save("request_routing", {"arguments": vars(args), "turns": found})


if __name__ == "__main__":
    main()
