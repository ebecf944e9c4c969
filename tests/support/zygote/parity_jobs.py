"""What the children of `engine_zygote` do: make a checkpoint, be a shard, run vLLM plainly or as a router."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

NUM_PROMPTS = 8
NEW_TOKENS = 64
TENSOR_TOKENS = 8  # of a router of two workers, which wait for each other in each layer
LONGEST_PROMPT = 24
WAIT_S = 120.0
_IMPORTED_BY_AN_ENGINE = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
)


def preload_engine() -> None:
    """Import what engines need without starting a thread or registering the plug-in.

    No numba: vLLM's CPU build looks at every module when a worker starts, and stumbles over llvmlite's library object.
    """
    for name in _IMPORTED_BY_AN_ENGINE:
        importlib.import_module(name)


def preload_shard() -> None:
    """Import what shards need and let Numba load its compiled code, which takes most of a shard's start."""
    from experts.transports.atomics import warm_up

    warm_up()


def prompts() -> list[list[int]]:
    """Eight prompts of different lengths, one token among them."""
    import torch

    from tests.support.family_configs import VOCAB

    generator = torch.Generator().manual_seed(7)
    lengths = [1, 2, 3, 5, 8, 13, 21, LONGEST_PROMPT]
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def make(emit: Any, family: str, path: str, overrides: dict[str, Any]) -> None:
    """Write a checkpoint and report the share of transformers' greedy choices that its routed experts change."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.random_checkpoints import make_checkpoint

    make_checkpoint(family, path, **overrides)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.tensor([[token for prompt in prompts() for token in prompt]])
    with torch.no_grad():
        with_experts = model(tokens).logits[0].argmax(-1)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.zero_()
        without = model(tokens).logits[0].argmax(-1)
    emit(changed=(with_experts != without).float().mean().item())


def shard(emit: Any, settings: dict[str, Any], placement: dict[str, Any], rank: int) -> None:
    """Be one shard until SIGTERM."""
    from experts.protocol.settings import ShardSettings
    from experts.shard.server import ShardServer
    from placement.placement import Placement

    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    server = ShardServer(ShardSettings.model_validate(settings))
    endpoint = server.start(Placement.from_json(placement), rank, epoch=1)
    emit(endpoint=asdict(endpoint))
    done.wait()
    server.stop()


def reference(emit: Any, model: str, result: str, dtype: str = "float32") -> None:
    """vLLM's own engine: greedy tokens, then their log-probabilities as parts of a prompt."""
    engine = _engine(model, {}, dtype)
    ids = _greedy(engine)
    _save(result, {"ids": ids, "logprobs": _teacher_forced(engine, ids), "gaps": _gaps(engine, ids)})
    emit(result=result)


def mesh(
    emit: Any,
    model: str,
    result: str,
    reference: str,
    memberships: list[dict[str, Any]],
    dtype: str = "float32",
    eager: bool = True,
) -> None:
    """The same with experts on shards, once for each membership; then score the reference's tokens."""
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    settings = RouterSettings(model_path=model, membership_by_rpc=True)
    engine = _engine(model, router_engine_kwargs(settings, {"enforce_eager": eager}), dtype)
    runs = []
    for membership in memberships:
        (applied,) = engine.collective_rpc("expertmesh_use_membership", args=(membership,))
        runs.append({"applied": applied, "ids": _greedy(engine)})
        (runs[-1]["status"],) = engine.collective_rpc("expertmesh_status")
    expected = _load(reference)
    for membership, run in zip(reversed(memberships), reversed(runs), strict=True):
        engine.collective_rpc("expertmesh_use_membership", args=({**membership, "epoch": 100 - membership["epoch"]},))
        run["logprobs"] = _teacher_forced(engine, expected["ids"])
    _save(result, {"runs": runs})
    emit(result=result)


def tensor(emit: Any, model: str, result: str, reference: str, membership: dict[str, Any]) -> None:
    """A router of two workers: the first greedy tokens, and the scores of all of the reference's."""
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    fork_workers()
    settings = RouterSettings(model_path=model, membership_by_rpc=True, router_id="r")
    engine = _engine(model, router_engine_kwargs(settings, dict(TWO_WORKERS)))
    applied = engine.collective_rpc("expertmesh_use_membership", args=(membership,))
    run = {"applied": applied, "ids": _greedy(engine, TENSOR_TOKENS)}
    run["logprobs"] = _teacher_forced(engine, _load(reference)["ids"])
    _save(result, {**run, "status": engine.collective_rpc("expertmesh_status")})
    emit(result=result)


TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def fork_workers() -> None:
    """Have an engine fork its workers from this process, which has imported vllm, instead of starting them anew."""
    import multiprocessing

    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]


def _engine(model: str, extra: dict[str, Any], dtype: str = "float32") -> Any:
    from vllm import LLM

    options = {
        "dtype": dtype,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": NUM_PROMPTS,
        "max_num_batched_tokens": NUM_PROMPTS * 128,
        "num_gpu_blocks_override": 96,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    return LLM(model, **{**options, **extra})


def greedy_sampling(count: int, **sampling: Any) -> Any:
    """How `count` tokens are sampled of which each is the likeliest."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=count, **sampling)


def _generate(engine: Any, token_ids: list[list[int]], max_tokens: int, **sampling: Any) -> list[Any]:
    return engine.generate(
        [{"prompt_token_ids": ids} for ids in token_ids], greedy_sampling(max_tokens, **sampling), use_tqdm=False
    )


def _greedy(engine: Any, count: int = NEW_TOKENS) -> list[list[int]]:
    outputs = _generate(engine, prompts(), max_tokens=count)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _forced(engine: Any, ids: list[list[int]], count: int) -> list[list[dict[int, float]]]:
    """For each new token, the log-probabilities of the `count` likeliest tokens and of the token itself."""
    whole = [prompt + new for prompt, new in zip(prompts(), ids, strict=True)]
    outputs = _generate(engine, whole, max_tokens=1, prompt_logprobs=count)
    return [
        [{token: entry.logprob for token, entry in at.items()} for at in output.prompt_logprobs[-NEW_TOKENS:]]
        for output in outputs
    ]


def _teacher_forced(engine: Any, ids: list[list[int]]) -> list[list[float]]:
    forced = _forced(engine, ids, count=0)
    return [[at[token] for at, token in zip(row, new, strict=True)] for row, new in zip(forced, ids, strict=True)]


def _gaps(engine: Any, ids: list[list[int]]) -> list[list[float]]:
    """How far the likeliest token is ahead of the next, at every new token."""
    forced = _forced(engine, ids, count=2)
    best = [[sorted(at.values(), reverse=True) for at in row] for row in forced]
    return [[values[0] - values[1] for values in row] for row in best]


def _save(path: str, value: Any) -> None:
    partial = Path(path + ".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def _load(path: str) -> Any:
    limit_s = time.monotonic() + WAIT_S
    while not Path(path).exists():
        if time.monotonic() > limit_s:
            raise TimeoutError(f"{path} did not appear within {WAIT_S} s")
        time.sleep(0.02)
    return json.loads(Path(path).read_text())


PRELOAD = {"engine": preload_engine, "shard": preload_shard}
JOBS = {"make": make, "shard": shard, "reference": reference, "mesh": mesh, "tensor": tensor}
