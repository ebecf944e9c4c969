"""How much a request may take, before anybody has made tokens of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ASKED = "expertmesh.asked"  # key of the scope
CHARACTERS_PER_TOKEN = 4
MAX_DATA_TOKENS = 1024  # for an image or a sound within the text, whatever its bytes
USUAL_COMPLETION = 512  # tokens, where the client sets no limit
PROMPTS = (
    *("messages", "prompt", "input", "instructions", "system", "suffix", "query", "items", "documents", "tools"),
    *("instruction", "queries", "texts", "inputs", "text_1", "text_2", "data_1", "data_2"),  # for engines that pool
)
COMPLETIONS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True)
class Asked:
    """What a body asks for."""

    model: str | None = None  # None: what is served
    prompt_tokens: int = 0  # by the length of the text
    completion_tokens: int | None = None  # of one sequence
    sequences: int = 1

    def tokens(self, max_model_len: int, generates: bool) -> int:
        """An estimate of all tokens; of the prompt's alone for a path that does not generate."""
        if not generates:
            return self.prompt_tokens
        completion = USUAL_COMPLETION if self.completion_tokens is None else self.completion_tokens
        return self.prompt_tokens + self.sequences * min(completion, max_model_len)


def asked_of(body: Any) -> Asked:
    """What a parsed body asks for. Its types are not checked yet; what has a wrong one does not count."""
    if not isinstance(body, dict):
        return Asked()
    limits: list[int] = [body[name] for name in COMPLETIONS if _is_count(body.get(name))]
    n, prompt = body.get("n"), body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    model = body.get("model")
    return Asked(
        model=model if isinstance(model, str) and model else None,
        prompt_tokens=sum(_tokens(body[name]) for name in PROMPTS if name in body),
        completion_tokens=min(limits) if limits else None,
        sequences=prompts * (n if isinstance(n, int) and _is_count(n) and n else 1),
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tokens(value: Any) -> int:
    """Of all text and token ids in a value; `BodyCheck` has bounded its depth."""
    if isinstance(value, str):
        tokens = -(-len(value) // CHARACTERS_PER_TOKEN)
        return min(tokens, MAX_DATA_TOKENS) if value.startswith("data:") else tokens
    if isinstance(value, list):
        if value and type(value[0]) is int:
            return len(value)
        return sum(map(_tokens, value))
    if isinstance(value, dict):
        return sum(map(_tokens, value.values()))
    return 0
