"""Keys by their hashes, as a file, a Secret or an environment variable lists them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from experts.protocol.settings import StrictModel

Role = Literal["client", "admin"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_FILE_BYTES = 4 * 2**20


class KeysError(ValueError):
    """A list of keys that cannot be used; the message says where and why, and holds no key."""


@dataclass(frozen=True)
class Limits:
    """What one key may use, over all routers. None: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and completions
    concurrency: int | None = None  # requests at the same time

    def __bool__(self) -> bool:
        return self != NO_LIMITS


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Key:
    """Who sends a request."""

    name: str
    role: Role = "client"
    limits: Limits = NO_LIMITS
    models: frozenset[str] = frozenset()  # by the names that clients send; empty: all


class KeyLine(StrictModel):
    """One entry of the list. Two of the same name, with the same rights, are two keys of one holder."""

    name: str = Field(description="Whose key it is, in logs, metrics and usage.")
    role: Role = Field(default="client", description="client: uses the model. admin: sees and changes the service too.")
    sha256: str = Field(description="SHA-256 of the key in hexadecimal digits.")
    requests_per_minute: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Most requests a minute.")
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Most tokens a minute, of prompts and completions."
    )
    concurrency: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Most requests at the same time.")
    models: list[str] = Field(default_factory=list, description="Models it may use; none listed: all.")

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} is no name: expected up to 64 letters, digits, '.', '_' and '-', first a letter or a digit"
            )
        return value

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str) -> str:
        if not SHA256.fullmatch(value):  # the value may be the key itself
            raise ValueError("expected 64 hexadecimal digits in lower case, as `expertmesh keys new` prints them")
        return value

    def key(self) -> Key:
        """What the entry grants."""
        limits = Limits(self.requests_per_minute, self.tokens_per_minute, self.concurrency)
        return Key(self.name, self.role, limits, frozenset(self.models))


_LINES = TypeAdapter(list[KeyLine])


@dataclass(frozen=True)
class Keyring:
    """Keys by their SHA-256 digests. Without any, requests need none."""

    keys: dict[bytes, Key] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, secret: str) -> Key | None:
        """Whose key this is. Digests are looked up, so the time it takes tells nothing of a key."""
        return self.keys.get(digest_of(secret))

    def has_role(self, role: Role) -> bool:
        """Whether any key has it."""
        return any(key.role == role for key in self.keys.values())

    def with_unnamed(self, name: str, role: Role, digests: Iterable[bytes]) -> Keyring:
        """The same and keys without limits that share one name; those that are known already stay what they are."""
        return Keyring({**dict.fromkeys(digests, Key(name, role)), **self.keys})


def digest_of(secret: str) -> bytes:
    """SHA-256 of a key as clients send it. Keys are random, so a slow hash would add nothing."""
    return hashlib.sha256(secret.encode()).digest()


def parse_keys(text: str, where: str) -> Keyring:
    """The keys of a YAML list of `KeyLine`s. Raises KeysError, with `where` in front of each line of its message."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise KeysError(f"{where} is no YAML{at}") from None  # without the line, in which a key may stand
    if not data:
        raise KeysError(f"{where} holds no key: add a line that `expertmesh keys new` prints")
    if isinstance(data, dict) and set(data) == {"keys"}:
        data = data["keys"]
    try:
        lines = _LINES.validate_python(data)
    except ValidationError as error:
        raise KeysError("\n".join(f"{where}{_place(item)}" for item in error.errors())) from None
    named: dict[str, Key] = {}
    keys: dict[bytes, Key] = {}
    for line in lines:
        key, digest = line.key(), bytes.fromhex(line.sha256)
        if named.setdefault(key.name, key) != key:
            raise KeysError(
                f"{where}: two keys are named {key.name} and differ in role, limits or models: make them equal"
            )
        if keys.setdefault(digest, key) != key:
            raise KeysError(f"{where}: {key.name} and {keys[digest].name} have the same key: make a new one for each")
    return Keyring(keys)


def _place(item: Any) -> str:
    """Where a mistake is and what it is, without the value."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
    message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
    return f"{path}: {message}"
