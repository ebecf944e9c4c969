"""Makes a key, and the line that lets its holder in."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.keys.keyring import KeyLine, digest_of

BYTES = 32


def new_key() -> str:
    """A random key of 256 bits."""
    import secrets

    return f"sk-{secrets.token_urlsafe(BYTES)}"


def line_of(key: str, **fields: Any) -> str:
    """One entry of the list of keys, on one line. Raises pydantic's ValidationError for fields that do not fit."""
    entry = KeyLine(sha256=digest_of(key).hex(), **fields)
    data = entry.model_dump(exclude_none=True)
    data = {"name": data.pop("name"), "role": data.pop("role"), **{k: v for k, v in data.items() if v != []}}
    return "- " + yaml.safe_dump(data, default_flow_style=True, sort_keys=False, width=10_000).strip()
