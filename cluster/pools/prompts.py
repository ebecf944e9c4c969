"""Which prompts a decode router has computed elsewhere, and how: what is asked for, and when it gives up."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config.pools.section import PoolsSection
from cluster.http.asked import Asked
from experts.kv_transfer.files import KVFolder
from experts.kv_transfer.handover import ask_params, new_name

logger = logging.getLogger("ray.serve")

TRIES = 2
PARAMS = "kv_transfer_params"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What vLLM's own connectors want of the router that computes a prompt.
OF_VLLM = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Of no use for a prompt: how much is answered, in how many ways, and in what form.
_ANSWER_ONLY = (
    *("stream", "stream_options", "n", "best_of", "min_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
    *("response_format", "structured_outputs", "return_token_ids"),
)
# vLLM takes nothing out of a cache for these, or makes several requests of one.
_ALONE = ("echo", "prompt_logprobs", "use_beam_search", "prompt_embeds")


@dataclass(frozen=True)
class PromptJob:
    """A prompt that a prefill router shall compute."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


class Ask(Protocol):
    """Has a prefill router compute a prompt: its `kv_transfer_params`, None if it has left nothing. Raises anything."""

    def __call__(self, job: PromptJob) -> Awaitable[dict[str, Any] | None]: ...


@dataclass(frozen=True)
class Handed:
    """A prompt that was computed elsewhere."""

    params: dict[str, Any]


class Prompts:
    """The prompts of one decode router's requests."""

    def __init__(
        self,
        section: PoolsSection,
        model_id: str,
        ask: Ask,
        folder: KVFolder | None,
        there: Callable[[], bool] = lambda: True,
    ) -> None:
        """`folder`: of KV cache; None if a connector of vLLM moves it. `there`: whether anybody can be asked."""
        self._section, self._model_id, self._ask, self._folder, self._there = section, model_id, ask, folder, there
        self._not_before_s = 0.0
        self.handed_over = 0  # prompts that were computed elsewhere
        self.given_up = 0  # those that should have been

    def wants(self, path: str, body: dict[str, Any], asked: Asked) -> bool:
        """Whether a request's prompt is to be computed elsewhere."""
        prompt = body.get("prompt")
        several = isinstance(prompt, list) and len(prompt) != 1 and not (prompt and type(prompt[0]) is int)
        return (
            path in (CHAT, COMPLETIONS)
            and asked.prompt_tokens >= self._section.remote_prefill_from_tokens
            and body.get("model") in (None, "", self._model_id)  # an adapter is loaded by each router for itself
            and not several
            and (self._folder is not None or asked.sequences == 1)  # vLLM's connectors hand over once
            and body.get("max_tokens") != 0
            and all(body.get(key) is None or body[key] is False for key in _ALONE)
        )

    async def compute(self, path: str, body: dict[str, Any], sequences: int, headers: dict[str, str]) -> Handed | None:
        """What the request has to bring, or None: the router computes the prompt itself. Waits `prefill_s` at most."""
        if not self._there() or time.monotonic() < self._not_before_s:
            self.given_up += 1
            return None
        name = new_name()
        prompt = {key: value for key, value in body.items() if key not in _ANSWER_ONLY}
        own = OF_VLLM if self._folder is None else ask_params(name)
        job = PromptJob(path, {**prompt, "max_tokens": 1, "stream": False, PARAMS: own}, headers)
        params = await self._try(job)
        if params is None:
            self.given_up += 1
            self._remove(name)
            return None
        self.handed_over += 1
        return Handed({**params, "keep": True} if self._folder is not None and sequences > 1 else params)

    def end(self, handed: Handed) -> None:
        """The request has ended; nobody reads the file any more, if it is still there."""
        self._remove(str(handed.params.get("file")))

    def _remove(self, name: str) -> None:
        if self._folder is not None:
            self._folder.remove(name)

    async def _try(self, job: PromptJob) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(self._section.prefill_s):
                for left in reversed(range(TRIES)):
                    try:
                        return await self._ask(job)
                    except TimeoutError:
                        raise
                    except Exception as error:
                        what = "another one is asked" if left and self._there() else "the prompt is computed here"
                        logger.warning("a prefill router failed: %s; %s", _line(error), what)
                        if not self._there():
                            return None
        except TimeoutError:
            # Whoever comes next shall not wait for the same.
            self._not_before_s = time.monotonic() + self._section.prefill_s
            logger.warning("no prefill router answered in %g s; prompts are computed here", self._section.prefill_s)
        return None


def with_params(body: bytes, params: dict[str, Any]) -> bytes:
    """A JSON object with one key more, its last; what the client wrote stays as it is."""
    return body.rstrip()[:-1] + b"," + json.dumps({PARAMS: params}).encode()[1:]


def _line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
