"""Tokens that the engine takes and makes for each request, counted where it gives them out.

So streams count whose clients did not ask for their usage, and requests whose clients hung up.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Meter:
    """One HTTP request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: bool = False  # the engine has given something out

    @property
    def tokens(self) -> int:
        """All."""
        return self.prompt_tokens + self.completion_tokens


METER: ContextVar[Meter | None] = ContextVar("expertmesh_meter", default=None)


def count_tokens(engine: Any) -> None:
    """Let an engine's `generate` and `encode` count what they give out with the `METER` of who asks."""
    generate, encode = engine.generate, getattr(engine, "encode", None)

    async def metered_generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(generate(prompt, sampling_params, *args, **kwargs)) as outputs:
            meter = METER.get()
            if meter is None:
                async for output in outputs:
                    yield output
                return
            is_delta = getattr(sampling_params.output_kind, "name", "") == "DELTA"
            lengths: dict[int, int] = {}  # of each sequence, where outputs repeat what was there before
            prompt_tokens = 0
            async for output in outputs:
                if not prompt_tokens:
                    prompt_tokens = len(output.prompt_token_ids or ())
                    meter.prompt_tokens += prompt_tokens
                    meter.started = True
                for one in output.outputs:
                    count = len(one.token_ids)
                    meter.completion_tokens += count if is_delta else count - lengths.get(one.index, 0)
                    lengths[one.index] = count
                yield output

    async def metered_encode(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        assert encode is not None
        meter, prompt_tokens = METER.get(), 0
        async with contextlib.aclosing(encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                if meter is not None and not prompt_tokens:
                    prompt_tokens = len(output.prompt_token_ids or ())
                    meter.prompt_tokens += prompt_tokens
                    meter.started = True
                yield output

    engine.generate = metered_generate
    if encode is not None:
        engine.encode = metered_encode
