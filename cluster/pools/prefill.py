"""A prefill router's side: it computes a prompt, and says where the KV cache of it is."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from cluster.pools.prompts import CHAT, PARAMS, PromptJob
from cluster.pools.ray_joints import raw_request
from experts.kv_transfer.files import KVFolder

logger = logging.getLogger("ray.serve")


class PromptFailedError(RuntimeError):
    """The engine answered with an error, which the decode router's own would say too, or get over."""


async def compute_prompt(server: Any, job: PromptJob) -> dict[str, Any] | None:
    """The `kv_transfer_params` of a prompt's answer. `server` is Ray Serve LLM's. PromptFailedError names its error."""
    from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

    chat = job.path == CHAT
    request = (ChatCompletionRequest if chat else CompletionRequest)(**job.body)
    answers = await (server.chat if chat else server.completions)(request, raw_request(job.headers))
    async for answer in answers:
        error = getattr(answer, "error", None)
        if error is not None:
            raise PromptFailedError(f"{error.code}: {error.message}")
        params = getattr(answer, PARAMS, None)
        return params if isinstance(params, dict) else None
    return None


async def sweep(folder: KVFolder, max_age_s: float) -> None:
    """Remove old files for as long as this router lives: those of routers that died are nobody else's to remove."""
    while True:
        try:
            if removed := await asyncio.to_thread(folder.sweep, max_age_s):
                logger.warning("%d KV files were %g s old and nobody had read them: removed", removed, max_age_s)
        except OSError as error:
            logger.warning("KV files cannot be looked through: %s", error)
        await asyncio.sleep(max_age_s / 4)
