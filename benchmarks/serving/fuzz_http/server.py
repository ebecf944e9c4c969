"""vLLM's app and the front door before a real engine, behind uvicorn; prints its URL. No Ray, no shards.

With adapters the engine is a router's that no shard is left to, since vLLM's own experts know no adapters on CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from typing import Any

from cluster.adapters.by_name import Adapters, by_name
from cluster.config.http_sections import HttpSection
from cluster.config.llm_sections import LoraSection
from cluster.http.app import front_door
from cluster.http.health import GenerationHealth


class OneRouter:
    """The health of an engine without shards."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def ready(self) -> GenerationHealth:
        return GenerationHealth(ok=not self._engine.errored, router_id="one", reason="", how="probe")

    async def all_routers(self) -> tuple[list[GenerationHealth], list[str]]:
        return [await self.ready()], []


def alone(model: str) -> dict[str, Any]:
    """Engine options of a router that computes all experts itself."""
    from experts.checkpoint import ExpertCheckpoint
    from experts.protocol.membership import Membership
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs
    from placement.placement import Placement

    spec = ExpertCheckpoint.open(model).spec
    nobody = Membership(1, Placement.linear(spec.num_layers, spec.num_experts, 1), (None,))
    settings = RouterSettings(model_path=model, membership=nobody.to_dict(), fallback_max_ms_per_step=60_000)
    return router_engine_kwargs(settings, {})


async def serve(
    model: str, plain: bool, http: HttpSection, lora: LoraSection | None, engine_options: list[str]
) -> None:
    import uvicorn
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *engine_options])
    if lora is not None:
        vars(args).update({**alone(model), **lora.engine_options({})})
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    if config.parallel_config.world_size == 1:
        config.parallel_config.distributed_executor_backend = "uni"
    engine = AsyncLLM.from_vllm_config(config, disable_log_stats=False)
    try:
        tasks = await engine.get_supported_tasks()
        app: Any = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        if not plain:
            adapters = None if lora is None else by_name(Adapters(app, "tiny-moe", lora), http.retry_after_s)
            front_door(app, http=http, model_id="tiny-moe", health=OneRouter(engine), adapters=adapters)
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        app.state.server = server
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        await server.serve(sockets=[listener])
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/tiny-moe")
    parser.add_argument("--plain", action="store_true", help="vLLM's app as it is, without the front door")
    parser.add_argument("--http", default="{}", help="the section http, as JSON")
    parser.add_argument("--lora-config", help="the section lora_config, as JSON")
    args, engine_options = parser.parse_known_args()
    http = HttpSection.model_validate_json(args.http)
    lora = None if args.lora_config is None else LoraSection.model_validate_json(args.lora_config)
    asyncio.run(serve(args.model, args.plain, http, lora, engine_options))


if __name__ == "__main__":
    sys.exit(main())
