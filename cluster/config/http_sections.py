"""The section `http` of the applications `llm` and `console`."""

from __future__ import annotations

import os

from pydantic import Field, field_validator

from experts.protocol.settings import StrictModel


class KeysSection(StrictModel):
    """Who may call."""

    api_keys: list[str] = Field(
        default_factory=list, description="Accepted API keys; without any, requests need no key. Prefer api_keys_env."
    )
    api_keys_env: str | None = Field(
        default=None, description="Environment variable with more keys, comma-separated. It must be set if named here."
    )
    retry_after_s: int = Field(default=1, ge=0, description="Retry-After header of a 503, in seconds.")

    @field_validator("api_keys")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if any(not key.strip() for key in value):
            raise ValueError("an API key is empty")
        return value

    def keys(self) -> frozenset[str]:
        """All accepted keys; none means that requests need no key. Raises ValueError if api_keys_env is not set."""
        return _with_env("api_keys_env", self.api_keys, self.api_keys_env)


class ConsoleHttpSection(KeysSection):
    """Who may call the console, and who may change the service through it."""

    admin_keys: list[str] = Field(
        default_factory=list,
        description="Keys that may change the placement, drain shards and clear traces, and read as API keys do. "
        "Without any, nothing can be changed over HTTP. Prefer admin_keys_env.",
    )
    admin_keys_env: str | None = Field(
        default=None,
        description="Environment variable with more admin keys, comma-separated. It must be set if named here.",
    )

    @field_validator("admin_keys")
    @classmethod
    def _none_empty(cls, value: list[str]) -> list[str]:
        if any(not key.strip() for key in value):
            raise ValueError("an admin key is empty")
        return value

    def admins(self) -> frozenset[str]:
        """All admin keys; none means that nobody may change anything.

        Raises ValueError if admin_keys_env is not set, or if an API key is among them.
        """
        admins = _with_env("admin_keys_env", self.admin_keys, self.admin_keys_env)
        if both := len(admins & self.keys()):
            raise ValueError(
                f"http: {both} of the admin keys {'is' if both == 1 else 'are'} among the API keys, which many clients "
                "have: use others"
            )
        return admins


def _with_env(name: str, keys: list[str], variable: str | None) -> frozenset[str]:
    """The keys of the section and of the environment variable that its key `name` names."""
    if variable is None:
        return frozenset(keys)
    named = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not named:
        raise ValueError(f"http.{name} names {variable}, which holds no key where the application is built")
    return frozenset([*keys, *named])


class HttpSection(KeysSection):
    """What stands before the OpenAI API, in addition to Serve's own http_options."""

    max_pending_requests: int = Field(
        default=256,
        ge=1,
        description="Most generation requests that a router holds, running or queued; others get status 503.",
    )
    max_body_bytes: int = Field(
        default=8 * 2**20, ge=1024, description="Largest request body; larger ones get status 413."
    )
    max_sequences_per_request: int = Field(
        default=256,
        ge=1,
        description="Most sequences that one request may ask for: its prompts times n. The engine takes a request's "
        "sequences all at once, and streams of others wait meanwhile.",
    )
    max_prompt_logprobs: int = Field(
        default=4096,
        ge=0,
        description="Most log-probabilities of prompt tokens in one request: tokens of the prompt times "
        "(prompt_logprobs + 1). They are made into text at once, and streams of others wait meanwhile.",
    )
    healthy_within_s: float = Field(
        default=10.0,
        ge=0,
        description="/health passes if a token was generated through the shards within this time; otherwise it "
        "generates one.",
    )
