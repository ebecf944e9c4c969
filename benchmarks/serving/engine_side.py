"""One side of the decode benchmark: an engine in a process of its own that takes orders on standard input.

    python -m benchmarks.serving.engine_side vllm|tp2|mesh MODEL DTYPE

It prints one JSON line when ready and one for each run, reads {"batch", "new_tokens", "prompt_tokens"} from each line,
and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from experts.vllm_plugin.engine_kwargs import CPU_ROUTER_ENV, router_engine_kwargs

CORES = sorted(os.sched_getaffinity(0))


def _environment(side: str) -> None:
    """Set what vLLM reads when it is imported. All sides get the same cores."""
    every = ",".join(str(c) for c in CORES)
    binding = "|".join(str(c) for c in CORES[:2]) if side == "tp2" else every
    if side == "mesh":
        binding = os.environ.get("EXPERTMESH_BENCH_ROUTER_CORES", every)
        os.environ.update({**CPU_ROUTER_ENV, **os.environ})
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND=binding, HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR"
    )


def run(llm: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Generate `new_tokens` for each prompt, all submitted together; throughput, first-token and inter-token times."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    engine = llm.llm_engine
    start = time.perf_counter()
    cpu_start = time.process_time()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{index}", {"prompt_token_ids": prompt}, params)
    arrivals: dict[str, list[float]] = {}
    tokens = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            count = len(output.outputs[0].token_ids)
            if count:
                arrivals.setdefault(output.request_id, []).append(time.perf_counter())
                tokens += count
    seconds = time.perf_counter() - start
    gaps = [b - a for times in arrivals.values() for a, b in itertools.pairwise(times)]
    return {
        "batch": len(prompts),
        "tokens_per_s": tokens / seconds,
        "ttft_s": [times[0] - start for times in arrivals.values()],
        "gap_s": gaps,
        "front_end_cpu_s": time.process_time() - cpu_start,
    }


def main() -> None:
    """Serve runs until standard input ends."""
    side, model, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    _environment(side)
    # vllm prints to standard output, which is for results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from benchmarks.common import real_prompts
    from benchmarks.shard_processes import ShardProcesses
    from experts.protocol.settings import RouterSettings

    engine_kwargs: dict[str, Any] = {
        "model": str(model),
        "dtype": dtype,
        "enforce_eager": os.environ.get("EXPERTMESH_BENCH_EAGER", "1") == "1",
        "max_model_len": 512,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    with contextlib.ExitStack() as stack:
        if side == "tp2":
            engine_kwargs["tensor_parallel_size"] = 2
        if side == "mesh":
            shards = stack.enter_context(ShardProcesses(model, dtype, num_ranks=2, cores=CORES[:2]))
            settings = RouterSettings(
                model_path=str(model),
                membership=shards.membership.to_dict(),
                dispatch_timeout_ms=60_000,
                spin_us=float(os.environ.get("EXPERTMESH_BENCH_SPIN_US", "50")),
            )
            engine_kwargs = router_engine_kwargs(settings, engine_kwargs)
        from vllm import LLM

        llm = LLM(**engine_kwargs)
        print(json.dumps({"ready": side}), file=results, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            prompts = real_prompts(order["batch"], order["prompt_tokens"], model)
            outcome = run(llm, prompts, order["new_tokens"])
            if side == "mesh" and order.get("status"):
                outcome["status"] = llm.collective_rpc("expertmesh_status")[0]
            print(json.dumps(outcome), file=results, flush=True)


if __name__ == "__main__":
    main()
