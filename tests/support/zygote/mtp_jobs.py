"""Jobs of `engine_zygote` for speculation by multi-token prediction: an engine of vLLM's own or a router, in rounds."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.support.zygote import parity_jobs
from tests.support.zygote.plugin_facts import error_of

NEW_TOKENS = 48
ADAPTED = ("o_proj", ".mlp.gate", "shared_experts.down_proj")  # names of layers end so


def checkpoint(emit: Any, family: str, path: str) -> None:
    """A random checkpoint with an MTP layer."""
    from tests.support.mtp_checkpoint import make_mtp_checkpoint

    emit(made=str(make_mtp_checkpoint(family, path)))


def adapted(emit: Any, model: str, folder: str) -> None:
    """An adapter for layers of the decoder, not of the MTP layer, and the checkpoint with it merged."""
    from pathlib import Path

    from experts.checkpoint import ExpertCheckpoint
    from tests.support.random_adapters import layers_of, merge, write_adapter

    base = Path(model)
    mtp_layer = f"layers.{ExpertCheckpoint.open(model, mtp=True).spec.layer_ids[-1]}."
    layers = layers_of(base, lambda name: mtp_layer not in name and name.endswith(ADAPTED))
    adapter = write_adapter(Path(folder) / "adapter", base, layers)
    emit(adapter=str(adapter), merged=str(merge(base, adapter, Path(folder) / "merged")))


def generate(
    emit: Any,
    model: str,
    guesses: int,
    membership: dict[str, Any] | None = None,
    victims: list[list[int]] = [[]],  # noqa: B006
    settings: dict[str, Any] = {},  # noqa: B006
    workers: int = 1,
    adapters: list[str] = [],  # noqa: B006
) -> None:
    """Greedy tokens of all prompts in rounds; in the middle of each the processes that `victims` lists are killed.

    `guesses` tokens are guessed by MTP, or none; `adapters` has each round's, "" for none. Emits `rounds`: of each
    `ids`, whether each request `finished` by its length, what vLLM counted (`drafts`, `accepted`), and a router's
    `status`, those of all its workers in `statuses`, and `loads`; or the `error` of its start.
    """
    options: dict[str, Any] = {}
    if adapters:
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    if guesses:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": guesses}
    if workers > 1:
        parity_jobs.fork_workers()
        options |= {**parity_jobs.TWO_WORKERS}
    if membership is not None:
        from experts.protocol.settings import RouterSettings
        from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

        made = RouterSettings(model_path=model, membership_by_rpc=True, **settings)
        options = router_engine_kwargs(made, options)
    found: list[Any] = []
    error = error_of(lambda: found.append(_engine(model, options)))
    if error is not None:
        emit(error=error, rounds=[])
        return
    (engine,) = found
    if membership is not None:
        engine.collective_rpc("expertmesh_use_membership", args=(membership,))
        engine.collective_rpc("expertmesh_loads", args=(3600.0,))
    rounds, before = [], _counted(engine)
    for number, killed in enumerate(victims):
        told = _round(engine, killed, adapters[number] if adapters else "")
        counted = _counted(engine)
        told |= {key: counted[key] - before[key] for key in counted}
        before = counted
        if membership is not None:
            told["statuses"] = engine.collective_rpc("expertmesh_status")
            told["status"] = told["statuses"][0]
            told["loads"] = _by_layer(engine.collective_rpc("expertmesh_loads", args=(3600.0,))[0])
        rounds.append(told)
    emit(error=None, rounds=rounds)


def _engine(model: str, options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=parity_jobs.NUM_PROMPTS,
        max_num_batched_tokens=parity_jobs.NUM_PROMPTS * 128,
        num_gpu_blocks_override=96,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **options,
    )


def _round(engine: Any, victims: list[int], adapter: str) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    sampling = parity_jobs.greedy_sampling(NEW_TOKENS)
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    for index, ids in enumerate(parity_jobs.prompts()):
        engine.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, sampling, lora_request=lora)
    done: dict[int, Any] = {}
    steps = 0
    while engine.llm_engine.has_unfinished_requests():
        steps += 1
        if steps == NEW_TOKENS // 3:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        for output in engine.llm_engine.step():
            if output.finished:
                done[int(output.request_id.partition("-")[0])] = output.outputs[0]
    outputs = [done[index] for index in sorted(done)]
    return {
        "ids": [list(output.token_ids) for output in outputs],
        "finished": [output.finish_reason == "length" for output in outputs],
    }


def _counted(engine: Any) -> dict[str, int]:
    """Tokens that were guessed and those that were right, since the engine began."""
    counters = {each.name: each.value for each in engine.get_metrics() if hasattr(each, "value")}
    of = {"drafts": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}
    return {key: int(counters.get(name, 0)) for key, name in of.items()}


def _by_layer(loads: dict[str, Any]) -> dict[str, Any]:
    """Tokens that were counted, and the picks of each layer."""
    import numpy as np

    counts_LE = np.frombuffer(loads["counts"], "<i8").reshape(-1, loads["num_experts"])
    return {"tokens": loads["tokens"], "layers": loads["layers"], "picks": counts_LE.sum(1).tolist()}


PRELOAD = {"engine": parity_jobs.preload_engine, "shard": parity_jobs.preload_shard}
JOBS = {"checkpoint": checkpoint, "adapted": adapted, "generate": generate, "shard": parity_jobs.shard}
