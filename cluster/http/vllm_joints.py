"""Every touch of vLLM's HTTP side but its routes: its keys, its exceptions, its way into the engine.

Written against vLLM 0.32. `tests/cluster/http/test_vllm_joints.py` fails when one of them moves.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from cluster.http.errors import RefusedError
from experts.vllm_plugin.engine_kwargs import EXPERTS_UNAVAILABLE as STOP_REASON

logger = logging.getLogger("ray.serve")

# What a request is told whose experts are on no shard while its router has no time to compute them.
EXPERTS_UNAVAILABLE = "experts that this request needs are being replaced: try again"

PROMPTS = ("messages", "prompt", "input", "texts", "inputs", "documents", "items", "text_2", "data_2", "query")
_CONTEXT = re.compile(r"maximum context length|maximum model length|maximum input length|max_model_len")
_PROMPT = re.compile(r"decoder prompt|one prompt|Token id \S+ is out of|empty conversation")
_NO_RESPONSE = re.compile(r"Response with id .* not found\.$")
_NOT_STORED = (
    'A router keeps responses if routers.env_vars has VLLM_ENABLE_RESPONSES_API_STORE: "1", in its own memory; '
    "without it send the whole conversation as input"
)
_EXTRAS = re.compile(r" \(parameter=[^()]*(, value=.*)?\)$", re.DOTALL)


def front_end_options(options: dict[str, Any]) -> dict[str, Any]:
    """Engine options that vLLM's front end reads as objects, made of a config's mappings; empty if there are none."""
    name = "structured_outputs_config"
    if not isinstance(options.get(name), dict):
        return {}
    from vllm.config import StructuredOutputsConfig

    return {name: StructuredOutputsConfig(**options[name])}


def take_keys(app: FastAPI) -> frozenset[bytes]:
    """SHA-256 digests of the keys that vLLM itself would ask for (VLLM_API_KEY); its own check is removed."""
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    digests: set[bytes] = set()
    for middleware in [one for one in app.user_middleware if one.cls is AuthenticationMiddleware]:
        digests |= set(AuthenticationMiddleware(app, **middleware.kwargs).api_tokens)  # type: ignore[arg-type]
        app.user_middleware.remove(middleware)
    return frozenset(digests)


def take_cors(app: FastAPI) -> None:
    """Remove vLLM's answer to browsers, which lets the pages of every origin in."""
    app.user_middleware[:] = [one for one in app.user_middleware if one.cls is not CORSMiddleware]


def forget_http_metrics() -> None:
    """Let the middleware that counts requests be built a second time.

    It keeps quiet, and counts nothing, where its metrics are registered already: by the stack that vLLM has built.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry = get_prometheus_registry()
    named = registry._names_to_collectors.items()
    for collector in {collector for name, collector in named if name.startswith(("http_request", "http_response"))}:
        registry.unregister(collector)


def model_card(app: FastAPI, model: str) -> Any:
    """The entry of /v1/models for a model. Awaitable; raises RefusedError if it is not served."""

    async def find() -> Any:
        models = await app.state.openai_serving_models.show_available_models()
        for card in models.data:
            if card.id == model:
                return card
        names = ", ".join(card.id for card in models.data)
        message = f"the model {model!r} does not exist; this service has {names}"
        raise RefusedError(message, param="model", code="model_not_found", status=404)

    return find()


def error_classes() -> tuple[type[Exception], ...]:
    """Bases of the exceptions that vLLM's handlers raise, apart from Python's own."""
    from vllm.exceptions import VLLMError

    return (VLLMError,)


def engine_generates(engine: Any) -> bool:
    """Whether an engine client's engine makes text; if not, it pools: embeddings, scores or classes."""
    return bool(engine.model_config.runner_type != "pooling")


def guard_engine(engine: Any, max_prompt_logprobs: int, has_adapters: bool = False) -> None:
    """Let the engine's `add_request` blame the client for what it cannot take, and leave nothing of it behind; and its
    `generate` and `encode` tell apart the requests that ended for want of experts.

    vLLM answers 500 without a word when a request cannot be prepared or sent to the engine's process (an integer that
    msgpack does not take), whether or not it has started to stream, and goes on counting it as unfinished.
    """
    from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    add_request, core = engine.add_request, engine.engine_core
    send = core.add_request_async

    async def checked_add_request(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(params, "prompt_logprobs", None)
        asked = engine.model_config.get_vocab_size() if asked == -1 else asked
        if asked is not None and has_adapters:
            # vLLM applies adapters to the head by the rows of a step's answers; those of a prompt end the engine.
            raise VLLMValidationError(
                "prompt_logprobs, or echo with logprobs, does not go with adapters, and this service has lora_config",
                parameter="prompt_logprobs",
            )
        length = len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0
        if asked is not None and length * (asked + 1) > max_prompt_logprobs:
            raise VLLMValidationError(
                f"prompt_logprobs={asked} of {length} prompt tokens are {length * (asked + 1)} log-probabilities, "
                f"expected at most {max_prompt_logprobs}: send a shorter prompt, or ask for fewer "
                "(http.max_prompt_logprobs)",
                parameter="prompt_logprobs",
            )
        try:
            return await add_request(request_id, prompt, params, *args, **kwargs)
        except (VLLMClientError, GracefulHTTPError, EngineDeadError):
            raise
        except Exception as error:
            if engine.errored:
                raise
            logger.warning("the engine cannot take a request", exc_info=error)
            raise VLLMValidationError(f"the engine cannot take this request: {_words(error)}") from error

    async def checked_send(request: Any) -> None:
        try:
            await send(request)
        except BaseException:
            with contextlib.suppress(Exception):  # the list of ids may be what cannot be sent
                await engine.abort(request.request_id, internal=True)
            raise

    generate, encode = engine.generate, engine.encode

    async def checked_generate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                if any(one.stop_reason == STOP_REASON for one in output.outputs if one.finish_reason == "error"):
                    raise RetryableRequestError(EXPERTS_UNAVAILABLE)
                yield output

    async def checked_encode(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                if output.finished and not output.outputs.data.numel():  # as the scheduler ends it
                    raise RetryableRequestError(EXPERTS_UNAVAILABLE)
                yield output

    engine.add_request = checked_add_request
    core.add_request_async = checked_send
    engine.generate, engine.encode = checked_generate, checked_encode


def fields_of(error: BaseException, fields: tuple[str, ...], has_grammar: bool) -> dict[str, Any] | None:
    """Arguments of `error_response` for what vLLM raises under a request; None if it is not known.

    `fields` are the names at the top of the request's body. An exception of a kind that values cause (a wrong type, a
    missing key, a recursion) is the client's: what breaks a sound engine in this way stands in the request.
    """
    from vllm.exceptions import (
        GenerationError,
        GracefulHTTPError,
        RetryableRequestError,
        VLLMClientError,
        VLLMNotFoundError,
        VLLMUnprocessableEntityError,
    )
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    cause = error.__cause__
    if isinstance(error, EngineDeadError) or (isinstance(error, EngineGenerateError) and _is_dead(cause)):
        return {"status": 503, "message": "the engine of this router has stopped; it is being replaced: try again"}
    if isinstance(error, GracefulHTTPError):
        return {"status": int(error.http_status), "message": error.message, "code": "queue_full"}
    if isinstance(error, VLLMClientError):
        unprocessable = isinstance(error, VLLMUnprocessableEntityError)
        status = 404 if isinstance(error, VLLMNotFoundError) else 422 if unprocessable else 400
        return client_fields(status, str(error), getattr(error, "parameter", None), fields)
    if isinstance(error, RetryableRequestError) and str(error) == EXPERTS_UNAVAILABLE:
        return unavailable_fields()
    if isinstance(error, RetryableRequestError):
        return {"status": 503, "message": f"{error}: try again"}
    if isinstance(error, GenerationError) and has_grammar:
        return grammar_fields(fields)
    if isinstance(error, EngineGenerateError | GenerationError):
        logger.error("the engine failed a request", exc_info=error)
        return None
    blamed = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError, RecursionError)
    if type(error) is Exception or isinstance(error, (*blamed, NotImplementedError)) or _is_foreign(error):
        logger.warning("a request that vLLM cannot process", exc_info=error)
        return client_fields(400, f"this request cannot be processed: {_words(error)}", None, fields)
    return None


def unavailable_fields() -> dict[str, Any]:
    """Arguments of `error_response` for a request that ended for want of experts."""
    return {"status": 503, "message": EXPERTS_UNAVAILABLE, "code": STOP_REASON}


def client_fields(status: int, message: str, param: str | None, fields: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of `error_response` for an error that vLLM tells in words, with OpenAI's `param` and `code`."""
    message = _EXTRAS.sub("", message)
    if status == 404 and _NO_RESPONSE.match(message):
        message = f"{message} {_NOT_STORED}"
    if status == 404 and "model" in message:
        return {"status": 404, "message": message, "param": "model", "code": "model_not_found"}
    if _CONTEXT.search(message) and param != "max_tokens":
        param = next((name for name in PROMPTS if name in fields), param)
        return {"status": 400, "message": message, "param": param, "code": "context_length_exceeded"}
    if param is None and _PROMPT.search(message):
        param = next((name for name in PROMPTS if name in fields), None)
    if param is None:
        param = next((word for word in _named(message) if word in fields), None)
    code = None if status != 400 else "invalid_value"
    return {"status": status, "message": message, "param": param, "code": code}


def _named(message: str) -> Iterator[str]:
    """Words of a message that may be the name of a field: its first one, quoted ones, and those_like_this."""
    for match in re.finditer(r"([`'\"]?)([a-z][a-z0-9_]*)", message):
        if match[1] or "_" in match[2] or match.start() == 0:
            yield match[2]


def grammar_fields(fields: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of `error_response` for a grammar that passed vLLM's check and then could not be compiled."""
    names = ("structured_outputs", "response_format", "text", "tools")
    param = next((name for name in names if name in fields), None)
    message = f"the engine cannot follow {param or 'the grammar of this request'}: simplify it"
    return {"status": 400, "message": message, "param": param, "code": "invalid_value"}


def _is_dead(error: BaseException | None) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def _is_foreign(error: BaseException) -> bool:
    """Errors of the template engine, and panics of Rust libraries, which are BaseException."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TemplateError", "PanicException"})


def _words(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    if text and type(error) in (ValueError, TypeError, NotImplementedError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
