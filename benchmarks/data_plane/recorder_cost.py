"""What recording costs a router: decode steps with and without it, in turns. Goal: under 1 %.

    python -m benchmarks.data_plane.recorder_cost [--quick] [--model tiny|bench|both] [--batch 64]

One engine with two shards generates from distinct prompts. Steps come in pairs, one recorded and one not, in an order
that alternates from pair to pair. "measured" is the median difference within a pair relative to the median step, with
bounds that hold 95 % of bootstrapped medians. "alone" is the recorder's own time for one step's ids relative to the
same step. The reservoir is full, as in a server that has run for a while.

Rows with "observed" are those of a router whose traffic the autopilot follows: it counts by phase and keeps steps too.
"report" is the time that packing a report takes between two steps, once in REPORT_S, and its share of that time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, TINY_MODEL, bench_model, print_table, real_prompts, save
from benchmarks.processes import run_tied

GOAL_PERCENT = 1.0
CAPACITY = 20_000  # RouterSettings.trace_tokens' default
REPORT_S = 5.0  # of the default autopilot.window_s
PROMPT_TOKENS, PAIRS_A_ROUND = 32, 100
MODELS = {"tiny": "float32", "bench": "bfloat16"}


def measure(model: Path, dtype: str, batch: int, num_pairs: int, observed: bool) -> dict[str, Any]:
    """One row. It turns this process into an engine, so call it once a process."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR"
    )
    from vllm import LLM, SamplingParams

    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    settings = RouterSettings(
        model_path=str(model), membership_by_rpc=True, dispatch_timeout_ms=60_000, trace_tokens=CAPACITY
    )
    engine_kwargs = {
        "model": str(model), "dtype": dtype, "enforce_eager": True, "max_model_len": 512, "max_num_seqs": batch,
        "max_num_batched_tokens": 4096, "enable_prefix_caching": False, "seed": 0, "async_scheduling": False,
    }  # fmt: skip
    llm = LLM(**router_engine_kwargs(settings, engine_kwargs))
    # Not earlier: on a CPU, vllm cannot set up an engine in a process that has imported numba.
    from benchmarks.shard_processes import ShardProcesses
    from experts.vllm_plugin.layer import current_client

    rounds = -(-num_pairs // PAIRS_A_ROUND)  # short sequences keep steps alike
    with ShardProcesses(model, dtype, num_ranks=2) as shards:
        llm.collective_rpc("expertmesh_use_membership", args=(shards.membership.to_dict(),))
        router = current_client()
        recording = router.recorder
        silent = type(recording)(router.shape, 0)
        recording.observation(go_on=observed)
        _fill(recording, router.shape, batch)
        prompts = real_prompts(batch, PROMPT_TOKENS, model)
        params = SamplingParams(temperature=0, max_tokens=2 * PAIRS_A_ROUND + 60, ignore_eos=True, detokenize=False)
        engine = llm.llm_engine
        pairs_s: list[tuple[float, float]] = []
        for round_number in range(rounds):
            for index, prompt in enumerate(prompts):
                engine.add_request(f"{round_number}-{index}", {"prompt_token_ids": prompt}, params)
            for _ in range(40):  # prefill and warm-up
                engine.step()
            for pair in range(PAIRS_A_ROUND):
                took_s = {}
                for on in (True, False) if pair % 2 else (False, True):
                    router.recorder = recording if on else silent
                    start_s = time.perf_counter()
                    engine.step()
                    took_s[on] = time.perf_counter() - start_s
                pairs_s.append((took_s[True], took_s[False]))
            while engine.has_unfinished_requests():
                engine.step()
        step_s = float(np.median([off for _, off in pairs_s]))
        low, cost, high = _median_with_bounds(np.array([on - off for on, off in pairs_s]) / step_s * 100)
        alone_s = _alone_s(recording, router.shape, batch)
        report_s = _report_s(recording, router.shape, batch) if observed else 0.0
    return {
        "model": model.name,
        "observed": observed,
        "batch": batch,
        "pairs": len(pairs_s),
        "step_ms": step_s * 1e3,
        "measured_percent": cost,
        "low_percent": low,
        "high_percent": high,
        "alone_us": alone_s * 1e6,
        "alone_percent": alone_s / step_s * 100,
        "report_ms": report_s * 1e3,
        "report_percent": report_s / REPORT_S * 100,
        "goal_percent": GOAL_PERCENT,
    }


def _steps(shape: Any, batch: int, count: int) -> list[list[np.ndarray]]:
    """Random ids of some steps, layer by layer."""
    rng = np.random.default_rng(0)
    draw = rng.random((count, shape.num_layers, batch, shape.num_experts)).argsort(-1)[..., : shape.top_k]
    return [list(step) for step in draw.astype(np.int32)]


def _fill(recorder: Any, shape: Any, batch: int) -> None:
    steps = _steps(shape, batch, 8)
    for number in range(CAPACITY // batch + 100):
        for layer, ids_TK in enumerate(steps[number % 8]):
            recorder.add(layer, ids_TK)


def _alone_s(recorder: Any, shape: Any, batch: int) -> float:
    """Median seconds the recorder takes for a step."""
    steps, took_s = _steps(shape, batch, 8), []
    for number in range(2000):
        start_s = time.perf_counter()
        for layer, ids_TK in enumerate(steps[number % 8]):
            recorder.add(layer, ids_TK)
        took_s.append(time.perf_counter() - start_s)
    return float(np.median(took_s))


def _report_s(recorder: Any, shape: Any, batch: int) -> float:
    """Median seconds that packing a report takes whose sample is full."""
    steps, took_s = _steps(shape, batch, 8), []
    for _ in range(20):
        for number in range(300):
            for layer, ids_TK in enumerate(steps[number % 8]):
                recorder.add(layer, ids_TK)
        start_s = time.perf_counter()
        recorder.observation(go_on=True)
        took_s.append(time.perf_counter() - start_s)
    return float(np.median(took_s))


def _median_with_bounds(values: np.ndarray) -> tuple[float, float, float]:
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(np.median(values)), float(high)


def main() -> None:
    """Print the table and write bench-results/recorder_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--row", choices=["recorded", "observed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    pairs = args.pairs or (100 if args.quick else 1000)
    if args.row:
        results = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # vllm prints on standard output
        model = TINY_MODEL if args.model == "tiny" else bench_model()
        row = measure(model, MODELS[args.model], args.batch, pairs, args.row == "observed")
        print(json.dumps(row), file=results, flush=True)
        return
    rows = []
    names = [*MODELS] if args.model == "both" else [args.model]
    for name, row in itertools.product(names, ("recorded", "observed")):
        command = [sys.executable, "-m", "benchmarks.data_plane.recorder_cost", "--row", row, "--model", name]
        done = run_tied(
            [*command, "--batch", str(args.batch), "--pairs", str(pairs)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the engine of {name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        rows.append(json.loads(done.stdout))
    print_table("Cost of recording, per decode step", list(rows[0]), [list(row.values()) for row in rows])
    save("recorder_cost", {"rows": rows})


if __name__ == "__main__":
    main()
