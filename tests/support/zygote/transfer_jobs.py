"""Jobs of `engine_zygote` for prompts that one engine computes and another goes on with. They report; tests judge."""

from __future__ import annotations

from typing import Any

from tests.support.zygote import parity_jobs

NEW_TOKENS = 8
BLOCK = 32
STEP_TOKENS = 64  # a longer prompt takes several steps


def _transferring(model: str, role: str, folder: str, max_bytes: int) -> Any:
    from vllm import LLM

    from experts.kv_transfer.engine_options import transfer_options

    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=STEP_TOKENS,
        num_gpu_blocks_override=96,
        block_size=BLOCK,
        enable_prefix_caching=True,
        disable_log_stats=False,
        seed=0,
        **transfer_options(role, folder, max_bytes),  # type: ignore[arg-type]
    )


def _generate(engine: Any, prompts: list[list[int]], params: list[Any], max_tokens: int) -> list[Any]:
    sampling = [
        parity_jobs.greedy_sampling(max_tokens, extra_args=None if each is None else {"kv_transfer_params": each})
        for each in params
    ]
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def compute_prompts(
    emit: Any, model: str, folder: str, prompts: list[list[int]], names: list[str | None], max_bytes: int = 1 << 30
) -> None:
    """A prefill router's engine: emits `offers`, the kv_transfer_params of the answers to prompts that come at once."""
    from experts.kv_transfer.handover import ask_params

    engine = _transferring(model, "prefill", folder, max_bytes)
    outputs = _generate(engine, prompts, [None if name is None else ask_params(name) for name in names], 1)
    emit(offers=[output.kv_transfer_params for output in outputs])
    emit(first=[list(output.outputs[0].token_ids) for output in outputs], done=True)


def go_on(emit: Any, model: str, folder: str, rounds: list[dict[str, Any]]) -> None:
    """A decode router's engine: emits `rounds`, for each request its tokens and the `cached_tokens` that a
    client reads, and how many tokens another engine had computed.

    A round has `prompts` and their `params`; its prompts come all at once, after the prefix cache was emptied unless it
    says `warm`.
    """
    engine = _transferring(model, "decode", folder, 1 << 30)
    found = []
    for each in rounds:
        if not each.get("warm"):
            assert engine.reset_prefix_cache()
        before = _taken(engine)
        outputs = _generate(engine, each["prompts"], each["params"], NEW_TOKENS)
        answers = [[list(output.outputs[0].token_ids), output.num_cached_tokens] for output in outputs]
        found.append({"answers": answers, "taken": _taken(engine) - before})
    emit(rounds=found, done=True)


def _taken(engine: Any) -> int:
    """Prompt tokens that did not have to be computed because another engine had, as vLLM counts them."""
    return sum(int(m.value) for m in engine.get_metrics() if m.name == "vllm:external_prefix_cache_hits")


def joints(emit: Any) -> None:
    """The shapes of everything of vLLM that the connector builds on."""
    import dataclasses
    import inspect

    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched.scheduler import Scheduler

    from experts.kv_transfer import vllm_connector

    ours, theirs = vllm_connector.PromptFiles, base.KVConnectorBase_V1
    own = sorted(name for name in vars(ours) if inspect.isfunction(vars(ours)[name]) and not name.startswith("_"))
    scheduler = " ".join(inspect.getsource(Scheduler).split())
    emit(
        unknown=[name for name in own if not hasattr(theirs, name)],
        missing=sorted(getattr(ours, "__abstractmethods__", ())),
        signatures={
            name: [list(inspect.signature(getattr(kind, name)).parameters) for kind in (theirs, ours)]
            for name in own
            if hasattr(theirs, name)
        },
        results=[each.name for each in dataclasses.fields(base.KVConnectorTransferResults)],
        says=[
            text
            for text in (
                'kv_transfer_params.get("do_remote_prefill")',
                'kv_transfer_params["remote_prefill_cached_tokens"] = ( prefill_stats.num_cached_tokens )',
                "self.connector.bind_kv_cache_manager(self.kv_cache_manager)",
                "request.num_computed_tokens = 0 self.failed_recving_kv_req_ids.add(req_id)",
            )
            if text in scheduler
        ],
        done=True,
    )


PRELOAD = {"engine": parity_jobs.preload_engine}
JOBS = {"make": parity_jobs.make, "compute_prompts": compute_prompts, "go_on": go_on, "joints": joints}
