"""A router whose engine pools: what it asks that for to see whether it serves, as it generates no token.

Touches what Ray Serve LLM's server holds of vLLM; `tests/cluster/router/test_pooling.py` fails when that moves.
"""

from __future__ import annotations

import uuid
from typing import Any

NO_SIGNATURES = (
    "routers.expert_signatures does not go with an engine that pools: the experts of its prompts are not sampled"
)


def engine_pools(llm_server: Any) -> bool:
    """Whether the engine of an LLMServer replica pools (embeddings, scores, classes) instead of generating."""
    return bool(llm_server.engine._engine_client.model_config.runner_type == "pooling")


async def pool_one_token(engine: Any) -> None:
    """Have an engine client pool a prompt of one token. Raises what the engine raises, also for want of experts."""
    from vllm import PoolingParams
    from vllm.inputs.engine import tokens_input

    task = engine.model_config.get_pooling_task(await engine.get_supported_tasks())
    params = PoolingParams(task=task)
    params.verify(engine.model_config)
    async for _ in engine.encode(tokens_input([0]), params, f"probe-{uuid.uuid4().hex}"):
        pass
