"""Time between tokens of 16 streams while long prompts arrive: two routers of one pool against one of each of two.

    python -m benchmarks.serving.pools [--quick] [--rounds 3] [--every-s 1.0]

Both stand over the same two shards of the tiny model, as two applications of one Ray cluster, and take turns: the one
that is not asked is idle. Each has two routers of one thread. Prefix caching is off, so that every prompt is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import median, percentile, print_table, real_prompts, save
from benchmarks.serving.endless_streams import Streams
from benchmarks.serving.service import OUTCOME_TIMEOUT_S, Service
from cluster.haproxy_guard import HAProxyGuard

MODEL, LONG_TOKENS, STREAM_TOKENS = "tiny-moe", 900, 100
SIDES = {"one pool of two routers": "", "prefill + decode": "/pools"}
POOLS = "pools"  # name of the second application


class TwoSides(Service):
    """The service of configs/tiny-pools.yaml, and beside it the same without pools."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "tiny-pools.yaml")
        applications = self._config["applications"]
        pooled = next(app for app in applications if app["name"] == "llm")
        pooled["args"]["routers"]["engine_kwargs"]["enable_prefix_caching"] = False
        plain = copy.deepcopy(pooled)
        del plain["args"]["pools"]
        plain["args"]["routers"]["count"] = 2
        plain["args"]["routers"]["engine_kwargs"]["max_num_seqs"] = 64
        pooled |= {"name": POOLS, "route_prefix": SIDES["prefill + decode"]}
        pooled["args"]["pools"]["kv_folder"] = str(folder / "kv")
        applications.append(plain)


class LongPrompts:
    """A long prompt each `every_s`, whatever becomes of those before; each is answered with one token."""

    def __init__(self, url: str, prompts: list[list[int]], every_s: float) -> None:
        self._url, self._prompts, self._every_s = f"{url}/v1/completions", prompts, every_s
        self._stop = threading.Event()
        self.seconds: list[float] = []
        self.failed: list[str] = []

    @contextlib.contextmanager
    def arriving(self) -> Iterator[LongPrompts]:
        """Until the block ends, and those that were sent are answered."""
        with ThreadPoolExecutor(16) as pool:
            sender = threading.Thread(target=self._send, args=(pool,))
            sender.start()
            try:
                yield self
            finally:
                self._stop.set()
                sender.join()

    def _send(self, pool: ThreadPoolExecutor) -> None:
        number = 0
        while not self._stop.wait(self._every_s):
            pool.submit(self._ask, self._prompts[number % len(self._prompts)])
            number += 1

    def _ask(self, prompt: list[int]) -> None:
        begun_s = time.monotonic()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        try:
            httpx.post(self._url, json=body, timeout=300).raise_for_status()
        except httpx.HTTPError as error:
            self.failed.append(repr(error))
        else:
            self.seconds.append(time.monotonic() - begun_s)


def measure(url: str, streams: int, every_s: float, seconds: float) -> dict[str, Any]:
    """One turn of one side."""
    long = LongPrompts(url, real_prompts(8, LONG_TOKENS), every_s)
    running = Streams(url, MODEL, real_prompts(streams, 32), max_tokens=STREAM_TOKENS)
    with running.running():
        running.wait_until_warm(OUTCOME_TIMEOUT_S)
        quiet_s = time.monotonic()
        time.sleep(seconds / 2)
        with long.arriving():
            start_s = time.monotonic()
            time.sleep(seconds)
            end_s = time.monotonic()
    quiet, found = running.window(quiet_s, start_s), running.window(start_s, end_s)
    return {
        "quiet_p99_ms": 1e3 * percentile(quiet.gaps_s, 0.99),
        "p50_ms": 1e3 * percentile(found.gaps_s, 0.5),
        "p99_ms": 1e3 * percentile(found.gaps_s, 0.99),
        "largest_ms": 1e3 * found.largest_gap_s,
        "tokens_per_s": found.chunks / (end_s - start_s),
        "long_prompts": len(long.seconds),
        "long_prompt_ms": 1e3 * median(long.seconds) if long.seconds else float("nan"),
        "failed": len(found.failed) + len(long.failed),
        "changed": found.changed,
    }


def main() -> None:
    """Print the table and write bench-results/pools.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--every-s", type=float, default=1.0, help="seconds between long prompts")
    args = parser.parse_args()
    rounds, seconds = (1, 5.0) if args.quick else (args.rounds, 20.0)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        # Short: the paths of Unix sockets below it may have 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)))
        stack.callback(HAProxyGuard(folder).close)
        service = stack.enter_context(TwoSides(folder).running())
        service.wait_for(POOLS, "RUNNING", lambda: None)
        for number in range(rounds):
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                found[side].append(measure(service.url + SIDES[side], args.streams, args.every_s, seconds))
                print(f"round {number}, {side}: {found[side][-1]}", flush=True)
    keys = list(found[next(iter(SIDES))][0])
    table = [[side, *(median(turn[key] for turn in found[side]) for key in keys)] for side in SIDES]
    title = f"{args.streams} streams while a prompt of {LONG_TOKENS} tokens arrives each {args.every_s:g} s, medians"
    print_table(title, ["side", *keys], table)
    one, two = (found[side] for side in SIDES)
    ratios = [b["p99_ms"] / a["p99_ms"] for a, b in zip(one, two, strict=True)]
    print(f"p99 between tokens, two pools over one, round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    save("pools", {"streams": args.streams, "every_s": args.every_s, "turns": found, "ratios": ratios})


if __name__ == "__main__":
    main()
