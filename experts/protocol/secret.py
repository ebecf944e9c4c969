"""The secret of a mesh: whoever knows it is a router or a shard of it, everybody else is a stranger."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping

SECRET_ENV = "EXPERTMESH_SECRET"
"""Where a process that no controller tells the secret looks for it."""
MIN_CHARACTERS = 32
_REMEDY = "make one with 'openssl rand -hex 32' and give all routers and shards the same"


class MeshSecretError(ValueError):
    """There is no usable secret; the message says what to do and never contains it."""


class MeshSecret:
    """Not a dataclass, so that neither `repr` nor `asdict` of what holds it shows it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        """MeshSecretError if `text` is too short to withstand guessing."""
        if len(text) < MIN_CHARACTERS:
            raise MeshSecretError(
                f"the mesh's secret has {len(text)} characters, expected at least {MIN_CHARACTERS}; {_REMEDY}"
            )
        self._text = text

    @classmethod
    def generate(cls) -> MeshSecret:
        """A new random one."""
        return cls(secrets.token_hex(32))

    @classmethod
    def from_environment(cls, name: str = SECRET_ENV, environment: Mapping[str, str] | None = None) -> MeshSecret:
        """What the variable `name` of this process's environment, or of another, holds, without white space around it.

        MeshSecretError if it is unset.
        """
        text = (os.environ if environment is None else environment).get(name, "").strip()
        if not text:
            raise MeshSecretError(f"the environment variable {name} holds no secret of the mesh; {_REMEDY}")
        try:
            return cls(text)
        except MeshSecretError as error:
            raise MeshSecretError(f"environment variable {name}: {error}") from None

    def sign(self, purpose: bytes, *parts: bytes) -> bytes:
        """HMAC-SHA256 of `parts`, 32 bytes. The lengths count: other cuts of the same bytes give another value."""
        code = hmac.new(self._text.encode(), purpose, hashlib.sha256)
        for part in parts:
            code.update(len(part).to_bytes(8) + part)
        return code.digest()

    def reveal(self) -> str:
        """The text itself, for a channel that carries nothing but text. Never for a log, a status or a setting."""
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeshSecret) and hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return "MeshSecret(...)"


def share_by_environment() -> None:
    """Give this process and its children a secret, unless they have one: for commands that start a mesh themselves."""
    os.environ.setdefault(SECRET_ENV, MeshSecret.generate().reveal())
