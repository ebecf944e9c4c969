"""Jobs of `engine_zygote` for engines that pool; facts go back as JSON to the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.zygote.parity_jobs import TWO_WORKERS, fork_workers
from tests.support.zygote.plugin_facts import error_of
from tests.support.zygote.refusal_jobs import (
    BLOCK,
    PROMPTS,
    SHARED,
    give_time,
    needed_by_prefix_alone,
    pairs_by_token,
    take_time,
    use_without,
)

# The offline engine wants some tokenizer where it pools.
TOKENIZER = str(Path(__file__).parents[3] / "examples" / "tiny-moe")
PLAIN: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "tokenizer": TOKENIZER,
    "max_model_len": 128,
    "seed": 0,
}


def pooled(engine: Any, prompts: list[list[int]], task: str) -> list[list[float]]:
    """What an offline engine pools of prompts, which it takes all at once; nothing for one that lacked experts."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [one.outputs.data.tolist() for one in engine.encode(asked, pooling_task=task, use_tqdm=False)]


def pool(
    emit: Any,
    model: str,
    task: str,
    prompts: list[list[int]],
    options: dict[str, Any],
    membership: dict[str, Any] | None = None,
) -> None:
    """Emits `pooled` of vLLM's own engine, or of one whose experts are on shards, and then its `status` too; or the
    `error` of its start."""
    from vllm import LLM

    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    asked = {**PLAIN, **options}
    if membership is not None:
        asked = router_engine_kwargs(RouterSettings(model_path=model, membership=membership), asked)
    started: list[Any] = []
    error = error_of(lambda: started.append(LLM(model, disable_log_stats=True, **asked)))
    if error is not None:
        emit(error=error, done=True)
        return
    (engine,) = started
    emit(pooled=pooled(engine, prompts, task))
    if membership is not None:
        emit(status=engine.collective_rpc("expertmesh_status")[0])
    emit(done=True)


def score(emit: Any, model: str, query: str, documents: list[str], options: dict[str, Any]) -> None:
    """Emits how well documents fit a query, by vLLM's own engine of a model with one class."""
    from vllm import LLM

    engine = LLM(model, disable_log_stats=True, **{**PLAIN, "max_model_len": 256, **options})
    emit(scores=[one.outputs.score for one in engine.score(query, documents, use_tqdm=False)], done=True)


def refusals_of_prompts(emit: Any, model: str, membership: dict[str, Any], workers: int) -> None:
    """Each prompt alone; then all at once while experts of the first are nowhere, and after those are back.

    Of several workers, all but the last have time for experts that are nowhere.
    """
    from vllm import LLM

    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    settings = RouterSettings(model_path=model, trace_tokens=1000, membership_by_rpc=True, router_id="r1")
    fork_workers()
    parallel = TWO_WORKERS if workers == 2 else {}
    options = {**PLAIN, **parallel, "runner": "pooling", "block_size": BLOCK, "enable_prefix_caching": True}
    engine = LLM(model, disable_log_stats=True, **router_engine_kwargs(settings, options))

    def call(name: str, *arguments: Any) -> Any:
        return engine.collective_rpc(name, args=arguments)[0]

    use_without(engine, membership, 1, set())
    alone, pairs = [], []
    for prompt in PROMPTS:
        call("expertmesh_clear_trace")
        alone += pooled(engine, [prompt], "embed")
        pairs.append(pairs_by_token(call("expertmesh_trace")))
    lost = needed_by_prefix_alone(pairs, len(SHARED))
    emit(alone=alone, lost=sorted(lost), prefix_was_found=len(pairs[1]) == 1)

    engine.collective_rpc(take_time)
    use_without(engine, membership, 2, lost)
    engine.reset_prefix_cache()
    emit(refused=pooled(engine, PROMPTS, "embed"), status_of_refused=call("expertmesh_status"))
    use_without(engine, membership, 3, set())
    emit(after=pooled(engine, PROMPTS, "embed"))  # nothing of what was computed without experts may be found again
    use_without(engine, membership, 4, lost)
    engine.reset_prefix_cache()
    engine.collective_rpc(give_time)
    emit(computed=pooled(engine, PROMPTS, "embed"), status_of_computed=call("expertmesh_status"), done=True)


def runner_types(emit: Any, cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Whether vLLM's engine of each (model, options) generates or pools, without starting one."""
    from vllm.engine.arg_utils import EngineArgs

    made = {name: EngineArgs(model=model, **options) for name, (model, options) in cases.items()}
    emit(runners={name: each.create_model_config().runner_type for name, each in made.items()})


JOBS = {"runner_types": runner_types, "pool": pool, "score": score, "refusals_of_prompts": refusals_of_prompts}
