"""What the children of `engine_zygote` do for the tests of the plug-in: look at vLLM, start engines, report facts.

Nothing is asserted here; facts go back as JSON to the tests, which know what they should be.
"""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.support.zygote import adapter_jobs, parity_jobs, pooling_jobs, refusal_jobs
from tests.support.zygote.compiled_jobs import compiled_layer
from tests.support.zygote.memory_jobs import reserved
from tests.support.zygote.option_facts import engine_configs, options
from tests.support.zygote.plugin_facts import error_of, joints, reading, refusal_joints, refusals, steps, verification

NUM_PROMPTS, NEW_TOKENS = 8, 48


def checkpoint(emit: Any, family: str, path: str, overrides: dict[str, Any], apart: bool = False) -> None:
    """A small random checkpoint; "qwen3" is a dense model. `apart` puts the routed experts in a file of their own."""
    import torch

    from tests.support.random_checkpoints import make_checkpoint

    if family == "qwen3":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        Qwen3ForCausalLM(Qwen3Config(**overrides)).to(torch.float32).save_pretrained(path)
    else:
        make_checkpoint(family, path, **overrides)
    if apart:
        _put_experts_apart(Path(path))
    emit(made=path)


def _put_experts_apart(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    files = {name: "experts.safetensors" if ".experts." in name else "dense.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def prompts() -> list[list[int]]:
    """Eight prompts of different lengths."""
    return parity_jobs.prompts()


def plain(emit: Any, model: str) -> None:
    """vLLM's own engine: greedy tokens, parameters, memory."""
    before = _anonymous_bytes()
    engine = _engine(model, {})
    (params,) = engine.apply_model(_count_params)
    emit(params=params, grown_bytes=_anonymous_bytes() - before)
    emit(ids=_greedy(engine))


def mesh(emit: Any, model: str, memberships: list[dict[str, Any]], eager: bool, victim: int | None = None) -> None:
    """A router's whole life: before the first epoch, after it, with a shard killed while it generates, later epochs."""
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    before = _anonymous_bytes()
    settings = RouterSettings(model_path=model, trace_tokens=1000, membership_by_rpc=True)
    engine = _engine(model, router_engine_kwargs(settings, {}), eager=eager)

    def call(name: str, *arguments: Any) -> Any:
        return engine.collective_rpc(name, args=arguments)[0]

    emit(
        before=call("expertmesh_status"),
        grown_bytes=_anonymous_bytes() - before,
        expert_parameters=_expert_parameters(engine),
        compilation=engine.llm_engine.vllm_config.compilation_config.mode.name,
    )
    emit(ids_of_zeros=_greedy(engine), still_before=call("expertmesh_status"))
    emit(applied=call("expertmesh_use_membership", memberships[0]))
    nothing_recorded, nothing_observed = call("expertmesh_trace"), call("expertmesh_observation", True)
    emit(ids=_greedy(engine), status=call("expertmesh_status"))
    recorded = [len(nothing_recorded), _tokens_recorded(call("expertmesh_trace"))]
    engine.collective_rpc(_warm_up)
    emit(dispatches_warmed_up=call("expertmesh_status")["dispatches"])
    recorded.append(_tokens_recorded(call("expertmesh_trace")))
    observed = _tokens_observed(call("expertmesh_observation", False))
    emit(observed=[len(nothing_observed), *observed])
    call("expertmesh_clear_trace")
    emit(num_prompts_of_one_token=sum(len(prompt) == 1 for prompt in prompts()))
    emit(recorded=[*recorded, len(call("expertmesh_trace"))], num_prompt_tokens=sum(map(len, prompts())))
    if victim is not None:
        emit(ids_of_killed=_greedy(engine, kill_in_the_middle=victim), after_kill=call("expertmesh_status"))
    for later in memberships[1:]:
        emit(refused=error_of(call, "expertmesh_use_membership", later), ids_after_refusal=_greedy(engine))
    emit(again=_greedy(engine), second_engine=error_of(_second_engine, model), done=True)


def _warm_up(worker: Any) -> None:
    """A step without requests, such as vLLM runs when it starts."""
    worker.model_runner._dummy_run(NUM_PROMPTS)


def _tokens_recorded(data: bytes) -> float:
    """All tokens counted, sampled or not."""
    from placement.traces.trace import ActivationTrace

    trace = ActivationTrace.load_npz(io.BytesIO(data))
    assert trace.counts is not None
    return trace.counts.sum() / trace.num_layers / trace.topk_ids.shape[2]


def _tokens_observed(data: bytes) -> list[int]:
    """Tokens that were generated, and those of prompts: of all, and of those in steps that were sampled."""
    import numpy as np

    from placement.traces.observation import Observation

    seen = Observation.from_bytes(data)
    prompts_T = np.concatenate([step.prefill_T for step in seen.sampled])
    return [*seen.tokens_P.tolist(), int((~prompts_T).sum()), int(prompts_T.sum())]


def start(emit: Any, model: str, model_path: str) -> None:
    """Try to start a router; emit the error, or None if it starts."""
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    settings = RouterSettings(model_path=model_path, membership_by_rpc=True)
    emit(error=error_of(_engine, model, router_engine_kwargs(settings, {})))


def _engine(model: str, extra: dict[str, Any], eager: bool = True) -> Any:
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        enforce_eager=eager,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=NUM_PROMPTS,
        max_num_batched_tokens=NUM_PROMPTS * 32,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **extra,
    )


def _second_engine(model: str) -> None:
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.layer import current_checkpoint

    current_checkpoint(RouterSettings(model_path=model, router_id="another"))


def _greedy(engine: Any, kill_in_the_middle: int | None = None) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch; the process `kill_in_the_middle` is killed halfway."""
    from vllm import SamplingParams

    if kill_in_the_middle is None:
        outputs = parity_jobs._generate(engine, prompts(), max_tokens=NEW_TOKENS)
        return [list(output.outputs[0].token_ids) for output in outputs]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=NEW_TOKENS)
    for index, ids in enumerate(prompts()):
        engine.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, sampling)
    done: dict[str, list[int]] = {}
    step = 0
    while engine.llm_engine.has_unfinished_requests():
        step += 1
        if step == NEW_TOKENS // 2:
            os.kill(kill_in_the_middle, signal.SIGKILL)
        for output in engine.llm_engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
    return [done[key] for key in sorted(done, key=lambda key: int(key.partition("-")[0]))]


def _count_params(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _expert_parameters(engine: Any) -> list[str]:
    """Names of the routed experts' parameters and buffers that are not empty."""

    def find(model: Any) -> list[str]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [name for name, tensor in tensors if "routed_experts" in name and tensor.numel() > 0]

    return engine.apply_model(find)[0]


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


PRELOAD = {"engine": parity_jobs.preload_engine, "shard": parity_jobs.preload_shard}
JOBS = {
    "checkpoint": checkpoint,
    "joints": joints,
    "refusal_joints": refusal_joints,
    "refusals": refusals,
    "reserved": reserved,
    "options": options,
    "engine_configs": engine_configs,
    "verification": verification,
    "reading": reading,
    "steps": steps,
    "refusals_of_requests": refusal_jobs.refusals_of_requests,
    "compiled_layer": compiled_layer,
    "plain": plain,
    "mesh": mesh,
    "start": start,
    "shard": parity_jobs.shard,
    **adapter_jobs.JOBS,
    **pooling_jobs.JOBS,
}
