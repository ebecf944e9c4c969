"""The OpenAI API before the routers: Ray Serve LLM's ingress, plus a health check that generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress

from cluster.config.apps import LLMAppConfig
from cluster.ray_joints import model_card
from cluster.router.client import RouterClient
from cluster.router.server import llm_config_of

ENDPOINTS: dict[str, Callable[[FastAPI], Callable[..., Any]]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
    "health": lambda app: app.get("/health"),
}


class ExpertMeshIngress(OpenAiIngress):
    """The handlers of ENDPOINTS; those of /v1 are Ray Serve LLM's."""

    def __init__(self, config: LLMAppConfig, routers: DeploymentHandle) -> None:
        model_id = config.model.id
        super().__init__({model_id: routers}, {model_id: model_card(llm_config_of(config))})
        self._config = config
        self._routers = RouterClient(routers)

    async def health(self) -> JSONResponse:
        """200 when every router generates tokens through the shards, else 503 with the reason."""
        routers, errors = await self._routers.generation_health(timeout_s=self._config.deadlines.probe_s + 5)
        errors = [*errors, *(f"{router.router_id}: {router.reason}" for router in routers if not router.ok)]
        reason = "; ".join(errors) if routers or errors else "there is no router yet"
        ok = bool(routers) and not reason
        body = {
            "status": "ok" if ok else "unavailable",
            "reason": reason,
            "routers": [router.to_dict() for router in routers],
        }
        headers = None if ok else {"Retry-After": str(self._config.http.retry_after_s)}
        return JSONResponse(body, status_code=200 if ok else 503, headers=headers)

    async def _get_model_id(self, model: str | None) -> str:
        """The model that a request means; 404 for one that is not served.

        Ray Serve LLM would take what follows a colon as the name of an adapter to load and remember.
        """
        if model is not None and model not in self._model_cards:
            message = f'Got request for model "{model}". Could not find base model with ID "{model}".'
            raise HTTPException(404, message)
        return await super()._get_model_id(model)
