"""The section `http` of the applications `llm` and `console`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from pydantic import Field, field_validator, model_validator

from experts.protocol.settings import StrictModel


class KeysSection(StrictModel):
    """Who may call."""

    keys_file: str | None = Field(
        default=None,
        description="Absolute path of a list of keys by their SHA-256 hashes, with names, roles and limits, as "
        "`expertmesh keys new` prints them. A change takes effect within seconds; a file that breaks leaves the "
        "last good keys in use.",
    )
    keys_env: str | None = Field(
        default=None, description="Environment variable with such a list. It must be set if named here."
    )
    api_keys: list[str] = Field(
        default_factory=list,
        description="Further API keys, as they are, without names and limits; without any key at all, requests need "
        "none. Prefer keys_file.",
    )
    api_keys_env: str | None = Field(
        default=None, description="Environment variable with more keys, comma-separated. It must be set if named here."
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="Origins whose pages may read answers in a browser, such as https://chat.example.org, or '*' for "
        "all; none by default.",
    )
    retry_after_s: int = Field(default=1, ge=0, description="Retry-After header of a 503, in seconds.")

    @field_validator("keys_file")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        if value is not None and not PurePosixPath(value).is_absolute():
            raise ValueError(f"{value!r} is no absolute path, and replicas run in folders of their own")
        return value

    @field_validator("api_keys")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if any(not key.strip() for key in value):
            raise ValueError("an API key is empty")
        return value

    @property
    def names_keys(self) -> bool:
        """Whether keys have names and limits."""
        return self.keys_file is not None or self.keys_env is not None

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests need a key."""
        return self.names_keys or bool(self.api_keys) or self.api_keys_env is not None

    def keys(self) -> frozenset[str]:
        """The keys without names. Raises ValueError if api_keys_env is not set."""
        return _with_env("api_keys_env", self.api_keys, self.api_keys_env)


class ConsoleHttpSection(KeysSection):
    """Who may call the console, and who may change the service through it."""

    admin_keys: list[str] = Field(
        default_factory=list,
        description="Keys, as they are, that may see and change the service, as keys of the role admin in keys_file. "
        "Without any, nothing can be changed over HTTP. Prefer keys_file.",
    )
    admin_keys_env: str | None = Field(
        default=None,
        description="Environment variable with more admin keys, comma-separated. It must be set if named here.",
    )
    ledger_app: str | None = Field(
        default=None, min_length=1, description="Where the usage of keys is counted, as http.ledger_app of the routers."
    )

    @field_validator("admin_keys")
    @classmethod
    def _none_empty(cls, value: list[str]) -> list[str]:
        if any(not key.strip() for key in value):
            raise ValueError("an admin key is empty")
        return value

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests need a key."""
        return super().asks_for_keys or bool(self.admin_keys) or self.admin_keys_env is not None

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

    ledger_app: str | None = Field(
        default=None,
        min_length=1,
        description="Application that counts what each key uses: the name of the gateway, behind which a key has one "
        "limit for all models. By default these routers have a ledger of their own.",
    )
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

    @model_validator(mode="after")
    def _counts_what_has_names(self) -> HttpSection:
        if self.ledger_app is not None and not self.names_keys:
            raise ValueError(
                f"ledger_app is {self.ledger_app!r}, but nothing is counted without names of keys: set keys_file or "
                "keys_env, or remove it"
            )
        return self


def ledger_disagreements(routers: HttpSection, console: ConsoleHttpSection | None, has_gateway: bool) -> Iterator[str]:
    """What does not fit of `ledger_app`, one line each."""
    if routers.ledger_app is not None and not has_gateway:
        yield f"http.ledger_app is {routers.ledger_app!r}, but the file has no gateway: remove it"
    if routers.names_keys and console is not None and console.ledger_app != routers.ledger_app:
        yield (
            f"http.ledger_app is {routers.ledger_app!r} for the routers and {console.ledger_app!r} for the console: "
            "make them equal"
        )
