"""Series of keys: what each has used at a router. Names of keys are labels; the keys themselves are nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.keys.messages import Totals
from cluster.observability.series import Samples, Series


@dataclass(frozen=True)
class KeysView:
    """What a router knows of its keys."""

    usage: Mapping[str, Totals]  # by name
    current: bool  # whether the keys in use are those of the file


def _by_key(name: str, value: Callable[[Totals], int], description: str) -> Series[KeysView]:
    def samples(view: KeysView) -> Samples:
        return {(key,): value(totals) for key, totals in view.usage.items()}

    return Series(name, "counter", description, samples, ("key",))


KEY_SERIES: tuple[Series[KeysView], ...] = (
    _by_key("key_requests", lambda t: t.requests, "Requests of the key that were let in"),
    _by_key("key_refused", lambda t: t.refused, "Requests of the key over a limit, or for a model it may not use"),
    _by_key("key_prompt_tokens", lambda t: t.prompt_tokens, "Prompt tokens of the key's requests"),
    _by_key("key_completion_tokens", lambda t: t.completion_tokens, "Tokens generated for the key"),
    Series(
        "keys_current",
        "gauge",
        "1 if the keys in use are those of http.keys_file as it is now",
        lambda view: {(): float(view.current)},
    ),
)
