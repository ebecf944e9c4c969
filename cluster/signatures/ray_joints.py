"""What signatures use of Ray Serve LLM's internals, beside `cluster.ray_joints`; a test names what a new version has
moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def text_of_tokens(llm_server: Any) -> Callable[[list[int]], str]:
    """The text of token ids by the tokenizer of an LLMServer's engine, without special tokens."""
    tokenizer = llm_server.engine._engine_client.get_tokenizer()
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
