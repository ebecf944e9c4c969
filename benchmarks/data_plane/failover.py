"""One of three shards dies or stops answering under 32 streams: what do the streams notice?

    python -m benchmarks.data_plane.failover [--quick]

The tiny model in float32. Each case starts three shards and an engine, generates once undisturbed, and again with the
fault in mid-stream. Goals: no request fails, no token changes, and the longest gap between two tokens of a stream stays
under 0.5 s for a killed process and under the dispatch time-out plus 0.5 s for a stopped one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import ROOT, TINY_MODEL, print_table, save
from benchmarks.processes import run_tied
from experts.vllm_plugin.engine_kwargs import CPU_ROUTER_ENV, router_engine_kwargs

STREAMS = 32
DISPATCH_TIMEOUT_S = 1.0


def case(fault: str, replicas: int, new_tokens: int) -> dict[str, Any]:
    """Run one case in this process, which becomes an engine. Returns its row."""
    os.environ.update(
        CPU_ROUTER_ENV,
        VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_OMP_THREADS_BIND=",".join(str(c) for c in sorted(os.sched_getaffinity(0))),
    )  # fmt: skip
    from benchmarks.common import real_prompts
    from benchmarks.shard_processes import ShardProcesses
    from experts.checkpoint import ExpertCheckpoint
    from experts.protocol.settings import RouterSettings
    from placement.placement import Placement

    spec = ExpertCheckpoint.open(TINY_MODEL).spec
    placement = Placement.linear(spec.num_layers, spec.num_experts, 3, min_replicas=replicas)
    with ShardProcesses(TINY_MODEL, "float32", placement) as shards:
        settings = RouterSettings(
            model_path=str(TINY_MODEL),
            membership=shards.membership.to_dict(),
            dispatch_timeout_ms=DISPATCH_TIMEOUT_S * 1000,
        )
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kwargs = {"model": str(TINY_MODEL), "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "seed": 0}
        llm = LLM(**router_engine_kwargs(settings, {**kwargs, "enable_prefix_caching": False}))
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        prompts = real_prompts(STREAMS, 24, TINY_MODEL)

        def generate(tag: str, at_token: int) -> tuple[dict[int, list[int]], float, int]:
            tokens: dict[int, list[int]] = {i: [] for i in range(STREAMS)}
            last: dict[int, float] = {}
            longest_s, failed = 0.0, 0
            for index, prompt in enumerate(prompts):
                llm.llm_engine.add_request(f"{tag}-{index}", {"prompt_token_ids": prompt}, params)
            hit = False
            while llm.llm_engine.has_unfinished_requests():
                for output in llm.llm_engine.step():
                    index = int(output.request_id.split("-")[1])
                    now = time.perf_counter()
                    if index in last:
                        longest_s = max(longest_s, now - last[index])
                    last[index] = now
                    tokens[index] += output.outputs[0].token_ids
                    failed += output.finished and output.outputs[0].finish_reason not in ("length", "stop")
                if not hit and at_token and len(tokens[0]) >= at_token:
                    hit = True
                    os.kill(shards.processes[1].pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            return tokens, longest_s, failed

        generate("warm", 0)
        undisturbed, usual_s, _ = generate("plain", 0)
        disturbed, longest_s, failed = generate("fault", new_tokens // 3)
        status = llm.collective_rpc("expertmesh_status")[0]
        if fault == "stop":
            os.kill(shards.processes[1].pid, signal.SIGKILL)
    return {
        "fault": {"kill": "kill -9", "stop": "SIGSTOP"}[fault],
        "replicas": replicas,
        "failed": failed + sum(len(t) != new_tokens for t in disturbed.values()),
        "tokens_changed": sum(a != b for i in disturbed for a, b in zip(disturbed[i], undisturbed[i], strict=True)),
        "longest_gap_s": longest_s,
        "usual_gap_s": usual_s,
        "goal_s": 0.5 + (DISPATCH_TIMEOUT_S if fault == "stop" else 0.0),
        "failovers": status["failovers"],
        "fallback_pairs": status["fallback_pairs"],
    }


def main() -> None:
    """Print the table and write bench-results/failover.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        fault, replicas, new_tokens = json.loads(args.case)
        results = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        print(json.dumps(case(fault, replicas, new_tokens)), file=results, flush=True)
        return
    rows = []
    for fault, replicas in (("kill", 2), ("kill", 1), ("stop", 2), ("stop", 1)):
        order = json.dumps([fault, replicas, 24 if args.quick else 96])
        outcome = run_tied(
            [sys.executable, "-m", "benchmarks.data_plane.failover", "--case", order],
            timeout_s=600, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        outcome.check_returncode()
        rows.append(json.loads(outcome.stdout.splitlines()[-1]))
    print_table(f"One of three shards lost under {STREAMS} streams", list(rows[0]), [list(r.values()) for r in rows])
    save("failover", {"streams": STREAMS, "dispatch_timeout_s": DISPATCH_TIMEOUT_S, "rows": rows})


if __name__ == "__main__":
    main()
