"""The tables of endpoints in docs/http.md, from the routes themselves.

python -m cluster.reference.http_page docs/http.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from cluster.console.admin import FOR_CLIENTS, HARMLESS, READING
from cluster.console.endpoints import ENDPOINTS, Console
from cluster.console.live import LIVE
from cluster.console.operations import OPERATIONS
from cluster.console.usage import USAGE
from cluster.http.gate import OPEN_PATHS
from cluster.http.health import add_health_routes

BEGIN, END = "<!-- endpoints: made by cluster/reference/http_page.py -->", "<!-- endpoints: end -->"

# vLLM's own paths, by its name for them; a test compares them with those that are left on its app.
VLLM: dict[tuple[str, str], str] = {
    ("POST", "/v1/chat/completions"): "OpenAI's chat completions; `stream` for server-sent events",
    ("POST", "/v1/completions"): "OpenAI's completions",
    ("POST", "/v1/responses"): "OpenAI's responses",
    ("GET", "/v1/responses/{response_id}"): "A response that was stored",
    ("POST", "/v1/responses/{response_id}/cancel"): "End a response that is being made",
    ("GET", "/v1/models"): "The models of this service",
    ("POST", "/v1/chat/completions/batch"): "Several chats in one request",
    ("POST", "/v1/messages"): "Anthropic's messages",
    ("POST", "/v1/messages/count_tokens"): "Tokens that such a request would take",
    ("POST", "/v1/systemone"): "Structured decisions (vLLM)",
    ("POST", "/generative_scoring"): "Probabilities of given labels after each of given items",
    ("POST", "/tokenize"): "Token ids of a text or a chat",
    ("POST", "/detokenize"): "The text of token ids",
    ("GET", "/load"): "Requests that this router has now",
    ("GET", "/version"): "vLLM's version",
    ("GET", "/metrics"): "HTTP and process figures of the router that answers",
    ("GET", "/docs"): "All of these, in a browser",
    ("GET", "/openapi.json"): "All of these, for programs",
}

# Those of a router whose engine pools; which of them it has follows from what its model gives.
POOLING: dict[tuple[str, str], str] = {
    ("POST", "/v1/embeddings"): "OpenAI's embeddings; of a model that embeds",
    ("POST", "/v2/embed"): "Cohere's embeddings; of a model that embeds",
    ("POST", "/classify"): "Classes of texts and their probabilities; of a model that classifies",
    **{
        ("POST", path): "How well texts fit together; of a model that embeds, or one with a single class"
        for path in ("/score", "/v1/score")
    },
    **{
        ("POST", path): "Documents in the order in which they fit a query; likewise"
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    },
    ("POST", "/pooling"): "What the engine pools, as it is",
}
# These are there for both.
BOTH = ("/v1/models", "/tokenize", "/detokenize", "/load", "/version", "/metrics", "/docs", "/openapi.json")


def block() -> str:
    """The tables, between BEGIN and END."""
    lines = [BEGIN, "", "### The model: routers", "", "| method | path | key | |", "|---|---|---|---|"]
    routers = [(method, path, words) for (method, path), words in VLLM.items()]
    routers.insert(6, ("GET", "/v1/models/{model}", "One model"))
    for method, path, words in (*routers, *_health()):
        lines.append(_row(method, path, "none" if path in OPEN_PATHS else "any", words))
    lines += ["", "### Embeddings, scores, classes: routers whose engine pools", ""]
    lines += [f"Beside {', '.join(f'`{path}`' for path in BOTH)} and the health routes:", ""]
    lines += ["| method | path | key | |", "|---|---|---|---|"]
    lines += [_row(method, path, "any", words) for (method, path), words in POOLING.items()]
    lines += ["", "### The service: console", "", "| method | path | key | |", "|---|---|---|---|"]
    lines += [_row(method, f"/expertmesh{path}", _key(method, path), words) for method, path, words in _console()]
    return "\n".join([*lines, "", END])


def written(text: str) -> str:
    """A page with its block made anew. Raises ValueError if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} with {END} after it")
    return before + block() + after


def _row(method: str, path: str, key: str, words: str) -> str:
    return f"| {method} | `{path}` | {key} | {words.replace('|', chr(92) + '|')} |"


def _health() -> Iterator[tuple[str, str, str]]:
    app = FastAPI(openapi_url=None)
    add_health_routes(app, SimpleNamespace(all_routers=None, ready=None), 1)  # type: ignore[arg-type]
    yield from _routes(app)


def _console() -> Iterator[tuple[str, str, str]]:
    app = FastAPI(openapi_url=None)
    console: Any = Console(SimpleNamespace(), SimpleNamespace(), [])  # type: ignore[arg-type]
    for routes, owner in (
        (ENDPOINTS, console),
        (OPERATIONS, console.operations),
        (USAGE, console.usage),
        (LIVE, console.live),
    ):
        for name, route in routes.items():
            route(app)(getattr(owner, name))
    yield from _routes(app)


def _routes(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    """(method, path, first sentence of the handler's docstring) of each route."""
    for route in app.router.routes:
        words = " ".join((getattr(route, "endpoint", None).__doc__ or "").split())
        for method in sorted(getattr(route, "methods", ())):
            yield method, str(getattr(route, "path", "")), re.split(r"(?<=\w\w)\. ", words)[0].rstrip(".")


def _key(method: str, path: str) -> str:
    if path in OPEN_PATHS or path == "/" or path.startswith("/page/"):
        return "none"
    if path in FOR_CLIENTS and method in READING:
        return "any"
    return "admin *" if method in READING or (method, path) in HARMLESS else "admin"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(written(page.read_text()))
