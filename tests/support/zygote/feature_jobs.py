"""Jobs of `engine_zygote` for what users ask of an engine and of its HTTP side, with its experts on live shards.

`generate` runs batches through vLLM's offline engine; `serve` is vLLM's HTTP app behind the project's front door, with
`engine_kwargs` taken apart as Ray Serve LLM does it. Both report; the tests judge.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import os
import socket
from typing import Any

from tests.support.zygote import parity_jobs, pooling_jobs
from tests.support.zygote.plugin_facts import error_of

_IMPORTED_BY_A_SERVER = (
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "cluster.http.app",
    "uvicorn",
    "xgrammar",
)
ENGINE_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 96,
    "seed": 0,
}


def preload_engine() -> None:
    """What `parity_jobs` imports for engines, and what their HTTP side needs."""
    parity_jobs.preload_engine()
    for name in _IMPORTED_BY_A_SERVER:
        importlib.import_module(name)


def _router_options(
    model: str, options: dict[str, Any], membership: dict[str, Any] | None, **settings_of_router: Any
) -> dict[str, Any]:
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    asked = {**ENGINE_OPTIONS, **options}
    if membership is None:
        return asked
    values = {"model_path": model, "membership": membership, "dispatch_timeout_ms": 60_000, **settings_of_router}
    settings = RouterSettings.model_validate(values)
    return router_engine_kwargs(settings, asked)


def generate(
    emit: Any,
    model: str,
    batches: list[list[list[int]]],
    max_tokens: int,
    options: dict[str, Any],
    membership: dict[str, Any] | None = None,
) -> None:
    """Greedy tokens of batches of prompts, one batch after another, with and without (None) shards.

    Emits `ids` [batch][prompt], `counters` (vLLM's, by name), the router's `status` and `prompts` it sampled, or the
    `error` of its start.
    """
    from vllm import LLM

    from placement.traces.observation import Observation
    from placement.traces.prompts import PromptSample

    started: list[Any] = []

    def start() -> None:
        made = _router_options(model, options, membership)
        started.append(LLM(model, disable_log_stats=False, skip_tokenizer_init=True, **made))

    error = error_of(start)
    if error is not None:
        emit(error=error, done=True)
        return
    (engine,) = started
    if membership is not None:
        engine.collective_rpc("expertmesh_observation", args=(True,))
        assert engine.collective_rpc("expertmesh_prompts") == [[]]
    ids = [
        [list(output.outputs[0].token_ids) for output in parity_jobs._generate(engine, batch, max_tokens=max_tokens)]
        for batch in batches
    ]
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    emit(ids=ids, counters=counters, error=None)
    if membership is not None:
        (observation,) = engine.collective_rpc("expertmesh_observation", args=(False,))
        observed = Observation.from_bytes(observation).tokens_P.tolist()
        (samples,) = engine.collective_rpc("expertmesh_prompts")
        found = [PromptSample.from_dict(each) for each in samples]
        emit(prompts=[[sample.tokens, sample.ids_RLK.tolist(), sample.num_experts] for sample in found])
        emit(status=engine.collective_rpc("expertmesh_status")[0], observed=observed)
    emit(done=True)


def serve(
    emit: Any,
    model: str,
    model_id: str,
    engine_kwargs: dict[str, Any],
    membership: dict[str, Any] | None,
    env_vars: dict[str, str] | None = None,
    http: dict[str, Any] | None = None,
    **settings_of_router: Any,
) -> None:
    """vLLM's app and the front door before an engine whose experts are on shards; emits its `url`, serves until ended.

    `engine_kwargs`, `env_vars` and `http` as in a config, of vLLM's engine and of its front end.
    """
    os.environ.update(env_vars or {})
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from cluster.http.vllm_joints import front_end_options

    _fork_engine()
    options = _router_options(model, engine_kwargs, membership, **settings_of_router)
    options |= front_end_options(options)
    of_front_end = {field.name for field in dataclasses.fields(FrontendArgs)}
    front_end = FrontendArgs(**{key: value for key, value in options.items() if key in of_front_end})
    engine_options = {key: value for key, value in options.items() if key not in of_front_end}
    engine_args = AsyncEngineArgs(model=model, served_model_name=[model_id], **engine_options)
    config = engine_args.create_engine_config()
    config.parallel_config.distributed_executor_backend = "uni"
    engine = AsyncLLM.from_vllm_config(config, disable_log_stats=False)
    try:
        args = argparse.Namespace(**(vars(front_end) | vars(engine_args)))
        asyncio.run(_serve(emit, engine, args, model_id, http or {}))
    finally:
        engine.shutdown()


def _fork_engine() -> None:
    """Have the engine's process forked from this one, which has imported vllm, instead of started anew."""
    import multiprocessing

    from vllm.v1.engine import utils

    utils.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]


class _Health:
    """What a router whose engine pools says of itself."""

    def __init__(self, engine: Any) -> None:
        from cluster.router.health import RouterHealth
        from cluster.router.pooling import pool_one_token
        from cluster.router.worker_calls import WorkerCalls

        worker = WorkerCalls(engine.collective_rpc, timeout_s=60.0)
        self._health = RouterHealth("r1", worker, lambda: pool_one_token(engine), lambda status: None)

    async def ready(self) -> Any:
        return await self._health.ready(timeout_s=60.0)

    async def all_routers(self) -> tuple[list[Any], list[str]]:
        return [await self._health.generation_health(within_s=0.0, timeout_s=60.0)], []


async def _serve(emit: Any, engine: Any, args: argparse.Namespace, model_id: str, http: dict[str, Any]) -> None:
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    from benchmarks.serving.fuzz_http.server import OneRouter
    from cluster.config.http_sections import HttpSection
    from cluster.http.app import front_door

    tasks = await engine.get_supported_tasks()
    app: Any = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    health: Any = OneRouter(engine) if "generate" in tasks else _Health(engine)
    front_door(app, http=HttpSection.model_validate(http), model_id=model_id, health=health)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    app.state.server = server
    emit(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    await server.serve(sockets=[listener])


PRELOAD = {"engine": preload_engine}
JOBS = {"generate": generate, "serve": serve, **pooling_jobs.JOBS}
