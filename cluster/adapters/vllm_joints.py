"""Every touch of vLLM's list of models and adapters.

Written against vLLM 0.32. `tests/cluster/adapters/test_vllm_joints.py` fails when something of it moves.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cluster.http.errors import RefusedError, UnavailableError

logger = logging.getLogger("ray.serve")


def max_lora_rank(app: FastAPI) -> int:
    """The largest rank of an adapter that the engine has room for."""
    return int(app.state.engine_client.vllm_config.lora_config.max_lora_rank)


async def load_adapter(app: FastAPI, model: str, folder: Path) -> None:
    """Have the engine load an adapter, which requests for `model` then get. RefusedError has vLLM's reason."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    request = LoadLoRAAdapterRequest(lora_name=model, lora_path=str(folder))
    answer = await app.state.openai_serving_models.load_lora_adapter(request)
    if isinstance(answer, ErrorResponse):
        if app.state.engine_client.errored:
            raise UnavailableError("the engine of this router has ended; try again")
        raise RefusedError(f"the adapter {model!r} cannot be served: {answer.error.message}", param="model")


async def unload_adapter(app: FastAPI, model: str) -> None:
    """Have the engine forget an adapter, of which no request is in progress."""
    models = app.state.openai_serving_models
    adapter = models.lora_requests.pop(model, None)
    if adapter is not None:
        await app.state.engine_client.remove_lora(adapter.lora_int_id)
        logger.info("adapter %s was unloaded", model)


def list_adapters(app: FastAPI, listed: Callable[[], Awaitable[dict[str, str]]]) -> None:
    """Let vLLM's list of models name all adapters, loaded or not. `listed` says where each is, by the model's name."""
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    models = app.state.openai_serving_models
    show = models.registry.show_available_models

    async def show_all() -> Any:
        shown, parent = await show(), models.model_name()
        for name, where in (await listed()).items():
            shown.data.append(ModelCard(id=name, root=where, parent=parent, permission=[ModelPermission()]))
        return shown

    models.show_available_models = show_all
