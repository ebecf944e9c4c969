"""A model that is served over HTTP, as its clients reach it: with the openai package, and with plain requests."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import httpx
import openai

TIMEOUT_S = 120.0


class ModelApi:
    """One address and one model."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    @cached_property
    def client(self) -> openai.OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request for the model; AssertionError if it is no success."""
        answer = httpx.post(self.url + path, json={"model": self.model, **body}, timeout=TIMEOUT_S)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def refused(self, path: str, method: str = "POST", **body: Any) -> tuple[int, dict[str, Any]]:
        """(status, error in OpenAI's format) of a request that is refused."""
        content = {"json": {"model": self.model, **body}} if method == "POST" else {}
        answer = httpx.request(method, self.url + path, timeout=TIMEOUT_S, **content)
        assert answer.status_code >= 400, answer.text
        error = dict(answer.json()["error"])
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error

    def tokens(self, prompt: str, max_tokens: int, **body: Any) -> list[int]:
        """Ids of the greedy tokens after a prompt."""
        asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, **body}
        return list(self.post("/v1/completions", **asked)["choices"][0]["token_ids"])

    def counter(self, name: str) -> float:
        """A series of /metrics, added up over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=TIMEOUT_S).text
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no series {name}"
        return sum(map(float, found))
