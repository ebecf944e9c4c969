"""From the model that a request names to the adapter that answers it: one ASGI middleware next to vLLM's routes."""

from __future__ import annotations

import contextlib

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.adapters import vllm_joints
from cluster.adapters.library import AdapterMissingError, Library
from cluster.adapters.shelf import Shelf
from cluster.config.llm_sections import LoraSection
from cluster.http.asked import ASKED, Asked
from cluster.http.errors import RefusedError, UnavailableError, error_response, response_for


class Adapters:
    """The adapters of one router: those that there are, and those that its engine holds."""

    def __init__(self, app: FastAPI, model_id: str, lora: LoraSection) -> None:
        """`app` is vLLM's, with its state set; its list of models names the adapters from now on."""
        self._prefix = f"{model_id}:"
        self.library = Library(lora, vllm_joints.max_lora_rank(app))
        self.shelf = Shelf(
            lora.max_num_adapters_per_replica,
            self.library.fetch,
            lambda name, folder: vllm_joints.load_adapter(app, self._prefix + name, folder),
            lambda name: vllm_joints.unload_adapter(app, self._prefix + name),
        )
        vllm_joints.list_adapters(app, self._listed)
        self._where = lora.dynamic_lora_loading_path

    def using(self, model: str | None) -> contextlib.AbstractAsyncContextManager[None]:
        """While this is open the engine holds the adapter that a request's `model` names; nothing for other models."""
        if model is None or not model.startswith(self._prefix):
            return contextlib.nullcontext()
        return self.shelf.using(model.removeprefix(self._prefix))

    async def _listed(self) -> dict[str, str]:
        """Where each adapter is, by the model's name."""
        return {self._prefix + name: f"{self._where}/{name}" for name in await self.library.names()}


class AdapterByName:
    """ASGI middleware behind `BodyCheck` and what refuses keys: an adapter is loaded for those who may use it."""

    def __init__(self, app: ASGIApp, adapters: Adapters, retry_after_s: int) -> None:
        self._app = app
        self._adapters = adapters
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; status 404 for an adapter that does not exist, 503 if it cannot be had now."""
        asked = scope.get(ASKED)
        model = asked.model if isinstance(asked, Asked) else None
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._adapters.using(model))
            except AdapterMissingError:
                message = f"the model {model!r} does not exist; GET /v1/models lists those that do"
                await error_response(404, message, "model", "model_not_found")(scope, receive, send)
                return
            except (RefusedError, UnavailableError) as error:
                await response_for(error, self._retry_after_s)(scope, receive, send)
                return
            await self._app(scope, receive, send)


def by_name(adapters: Adapters, retry_after_s: int) -> Middleware:
    """The middleware for `front_door`."""
    return Middleware(AdapterByName, adapters=adapters, retry_after_s=retry_after_s)
