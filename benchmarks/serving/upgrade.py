"""Upgrades of the application `llm` under endless streams: what clients notice, with good and with broken versions.

    python -m benchmarks.serving.upgrade [--quick] [--streams 16] [--cases 0,1,6,7]

One router and three shards of the tiny model on a Ray cluster of their own. Each case is one `serve deploy` (its config
handed to Serve as that command does) in the middle of the streams; after a version that does not come up, the next
deploy has to be accepted. Goals in every case: no failed request, no changed token, no gap between chunks over 1 s.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import TINY_MODEL, print_table, real_prompts, save
from benchmarks.serving.endless_streams import Streams, Window
from benchmarks.serving.service import ENGINE_TITLE, OUTCOME_TIMEOUT_S, Service
from cluster.haproxy_guard import HAProxyGuard

AFTERWARDS_S = 5.0
LOADING_S = (2.0, 10.0, 20.0)  # how long after its start the first, second, third new router is killed
GAP_GOAL_S = 1.0

Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """One deploy: a change to the arguments of `llm`, and the state it has to end in."""

    name: str
    change: Change
    outcome: str
    kill: bool = False


def _max_num_seqs(value: int) -> Change:
    return lambda llm: llm["routers"]["engine_kwargs"].update(max_num_seqs=value)


def cases(folder: Path) -> list[Case]:
    """Good, broken and good again; `folder` gets a checkpoint without its weights."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY_MODEL / file, folder)

    def option(llm: dict[str, Any]) -> None:
        llm["routers"]["engine_kwargs"]["max_num_sequences"] = 32

    def broken(llm: dict[str, Any]) -> None:
        # Only the engine can tell: the checkpoint has four layers.
        llm["routers"]["engine_kwargs"]["hf_overrides"] = {"num_hidden_layers": 2}

    def missing(llm: dict[str, Any]) -> None:
        llm["model"] = {**llm["model"], "path": str(folder)}

    return [
        Case("max_num_seqs changed", _max_num_seqs(60), "RUNNING"),
        Case("misspelt option", option, "DEPLOY_FAILED"),
        Case("accepted after it", _max_num_seqs(59), "RUNNING"),
        Case("model without weights", missing, "DEPLOY_FAILED"),
        Case("option that breaks the engine", broken, "DEPLOY_FAILED"),
        Case("accepted after it", _max_num_seqs(58), "RUNNING"),
        Case("router killed while it loads", _max_num_seqs(57), "DEPLOY_FAILED", kill=True),
        Case("accepted after it", _max_num_seqs(56), "RUNNING"),
    ]


def run(service: Service, streams: Streams, case: Case) -> dict[str, Any]:
    """One case; the row of the table."""
    old = service.processes()
    seen: dict[int, float] = {}

    def kill_those_that_load() -> None:
        for pid in service.processes() - old:
            first_s = seen.setdefault(pid, time.monotonic())
            if time.monotonic() - first_s > LOADING_S[min(list(seen).index(pid), 2)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    start_s = time.monotonic()
    service.deploy(lambda apps: case.change(apps["llm"]["args"]))
    message = service.wait_for("llm", case.outcome, kill_those_that_load if case.kill else lambda: None)
    done_s = time.monotonic()
    time.sleep(AFTERWARDS_S)
    found = streams.window(start_s, time.monotonic())
    left = service.processes()
    stayed = old <= left
    if stayed == (case.outcome == "RUNNING"):
        raise RuntimeError(f"{case.name}: the old router {'still runs' if stayed else 'is gone'}")
    return {
        "case": case.name,
        "outcome": case.outcome,
        "seconds": done_s - start_s,
        "why": message.strip().splitlines()[-1] if case.outcome == "DEPLOY_FAILED" else "",
        "engines_left": len(service.processes(ENGINE_TITLE)) - len(left),
        **_facts(found),
    }


def main() -> None:
    """Print the table and write bench-results/upgrade.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two cases")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--cases", help="which of them, by number from 0, such as 0,1,6,7")
    args = parser.parse_args()
    prompts = real_prompts(args.streams, 32)
    with contextlib.ExitStack() as stack:
        # Short: the paths of Unix sockets below it may have 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)))
        (folder / "model").mkdir()
        stack.callback(HAProxyGuard(folder).close)
        service = stack.enter_context(Service(folder).running())
        streams = stack.enter_context(Streams(service.url, "tiny-moe", prompts, max_tokens=200).running())
        rows = [_undisturbed(streams)]
        every = cases(folder / "model")
        wanted = (
            [int(number) for number in args.cases.split(",")] if args.cases else range(2 if args.quick else len(every))
        )
        for case in (every[number] for number in wanted):
            print(f"{case.name} ...", flush=True)
            rows.append(run(service, streams, case))
    table = [
        [
            *(row["case"], row["outcome"], row["seconds"], row["requests"], len(row["failed"]), row["changed"]),
            *(row["largest_gap_s"], row["largest_first_token_s"], row["engines_left"]),
        ]
        for row in rows
    ]
    header = [
        "case",
        "outcome",
        "seconds",
        "requests",
        "failed",
        "changed",
        "largest gap s",
        "slowest first token s",
        "engines left",
    ]
    print_table(f"Upgrades under {args.streams} endless streams (goals: 0, 0, {GAP_GOAL_S} s)", header, table)
    for row in rows:
        if row["why"] or row["failed"]:
            print(f"  {row['case']}: {row['why']} {row['failed'][:3] or ''}")
    save("upgrade", {"streams": args.streams, "rows": rows})


def _facts(window: Window) -> dict[str, Any]:
    facts = asdict(window)
    del facts["gaps_s"]
    return facts


def _undisturbed(streams: Streams, seconds: float = 20.0) -> dict[str, Any]:
    """The same without a deploy, once every stream has had its first text."""
    streams.wait_until_warm(OUTCOME_TIMEOUT_S)
    start_s = time.monotonic()
    time.sleep(seconds)
    found = streams.window(start_s, time.monotonic())
    return {"case": "no deploy", "outcome": "", "seconds": seconds, "why": "", "engines_left": 0, **_facts(found)}


if __name__ == "__main__":
    main()
