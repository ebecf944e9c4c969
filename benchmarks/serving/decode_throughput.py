"""Output tokens/s, time to first token, time between tokens: plain vLLM, vLLM with TP=2, one router with two shards.

    python -m benchmarks.serving.decode_throughput [--quick] [--model bench|tiny|both]

Every side gets the same cores, the same prompts (distinct, from the standard library's source) and the same engine
settings. Runs are interleaved; medians of at least five count. Only one side runs at a time; the others are paused,
since vLLM's idle workers would take the cores. Goals are times the better vLLM's tokens/s. `--sides
mesh,mesh:../before` compares with the router of another checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, TINY_MODEL, bench_model, median, percentile, print_table, save
from benchmarks.processes import tied
from experts.kernels.emulation import advice

ENGINE_SIDE = (sys.executable, "-m", "benchmarks.serving.engine_side")
SIDES = ("vllm", "tp2", "mesh")
NAMES = {"vllm": "vLLM, one process", "tp2": "vLLM, TP=2", "mesh": "expertmesh, 1 router + 2 shards"}
GOALS = {"bfloat16": {1: 1.05, 16: 1.2, 64: 1.25, 256: 1.5}, "float32": {1: 1.0, 64: 1.15, 256: 1.0}}
"""Of the bench model in bfloat16, and of the tiny one in float32."""


class Side:
    """A running engine_side process with its children, paused except during its own runs."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process

    def pause(self) -> None:
        """Stop the process and its children, so that vLLM's idle workers leave the cores to the other sides."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def read(self) -> dict[str, Any]:
        """The next line from the process. Raises RuntimeError if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"side {self.name} ended, exit code {self._process.wait(10)}")
        return dict(json.loads(line))

    def run(self, batch: int, new_tokens: int, prompt_tokens: int, status: bool = False) -> dict[str, Any]:
        """One run; see engine_side.run."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        order = {"batch": batch, "new_tokens": new_tokens, "prompt_tokens": prompt_tokens, "status": status}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        outcome = self.read()
        self.pause()
        return outcome

    def close(self) -> None:
        """Let the process end by itself, within 60 s."""
        assert self._process.stdin is not None
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)


@contextlib.contextmanager
def started(name: str, model: Path, dtype: str) -> Iterator[Side]:
    """A paused side, "mesh:TREE" from another checkout; it ends with the context, and with this process."""
    kind, _, tree = name.partition(":")
    with tied(
        [*ENGINE_SIDE, kind, str(model), dtype], env={**os.environ, "PYTHONPATH": tree or str(ROOT)},
        cwd=tree or ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        side = Side(name, process)
        side.read()
        side.pause()
        yield side
        side.close()


def compare(model: Path, dtype: str, batches: list[int], turns: int, new_tokens: int, sides: list[str]) -> list[Any]:
    """The table's rows for one model, one for each batch and side."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(started(name, model, dtype)) for name in sides]
        for side in running:
            side.run(4, 8, 32)
        for batch in batches:
            found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in running}
            for turn in range(turns + 1):
                for side in running:
                    outcome = side.run(batch, new_tokens, 32)
                    if turn:  # the first turn warms up
                        found[side.name].append(outcome)
            speed = {name: median(o["tokens_per_s"] for o in found[name]) for name in found}
            best_vllm = max((speed[name] for name in speed if not name.startswith("mesh")), default=float("nan"))
            for name in sides:
                ttft = [t for o in found[name] for t in o["ttft_s"]]
                gaps = [g for o in found[name] for g in o["gap_s"]]
                rows.append(
                    {
                        "model": model.name,
                        "dtype": dtype,
                        "batch": batch,
                        "side": NAMES.get(name, name),
                        "tokens_per_s": speed[name],
                        "of_better_vllm": speed[name] / best_vllm,
                        "goal": GOALS[dtype].get(batch, "") if name == "mesh" else "",
                        "ttft_p50_ms": percentile(ttft, 0.5) * 1e3,
                        "ttft_p99_ms": percentile(ttft, 0.99) * 1e3,
                        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
                        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
                    }
                )
    return rows


def main() -> None:
    """Print the tables and write bench-results/decode_throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=["bench", "tiny", "both"], default="both")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--turns", type=int)
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="of the bench model; auto: bfloat16, or float32 where bfloat16 is emulated and slower",
    )  # fmt: skip
    parser.add_argument("--sides", default=",".join(SIDES), help="some of these, and mesh:TREE for another checkout's")
    args = parser.parse_args()
    turns = args.turns or (1 if args.quick else 5)
    new_tokens = 16 if args.quick else 64
    batches = [int(b) for b in args.batches.split(",")]
    rows = []
    if args.model in ("bench", "both"):
        emulated = advice(torch.bfloat16, "cpu")
        if args.dtype == "auto" and emulated is not None:
            print(f"bench model in float32: {emulated}")
        dtype = args.dtype if args.dtype != "auto" else "bfloat16" if emulated is None else "float32"
        rows += compare(bench_model(), dtype, batches, turns, new_tokens, args.sides.split(","))
    if args.model in ("tiny", "both"):
        rows += compare(TINY_MODEL, "float32", batches, turns, new_tokens, args.sides.split(","))
    print_table(f"Decode, {new_tokens} new tokens, prompts of 32", list(rows[0]), [list(r.values()) for r in rows])
    save("decode_throughput", {"turns": turns, "new_tokens": new_tokens, "rows": rows})


if __name__ == "__main__":
    main()
