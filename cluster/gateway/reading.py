"""What a gateway has to know of a request: its body, the model that this names, and what the split goes by."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Receive, Scope

from cluster.config.gateway.sections import VersionsSection
from cluster.gateway.forward import VERSION, Asked
from cluster.http.errors import RefusedError
from cluster.http.gate import key_in
from cluster.keys.keyring import digest_of
from cluster.keys.sources import UNNAMED

LARGE_BODY = 64 * 1024  # bytes; parsing a larger one would hold up the streams of others


class ClientGoneError(Exception):
    """The client left before its request was complete."""


def path_of(scope: Scope) -> str:
    """The path below the gateway's route prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def header_of(scope: Scope, name: bytes) -> str:
    """The first value of a header, empty without one."""
    return next((value.decode("latin-1").strip() for key, value in scope["headers"] if key == name), "")


async def read(scope: Scope, receive: Receive, max_body_bytes: int) -> Asked:
    """The whole request. Raises RefusedError (413) for a body that is too large, ClientGoneError."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > max_body_bytes:
            raise RefusedError(f"the request body has more than {max_body_bytes} bytes", status=413)
        more = message.get("more_body", False)
    query = scope.get("query_string", b"")
    raw = scope.get("raw_path")
    path = raw.decode("latin-1").removeprefix(scope.get("root_path", "")) if raw else path_of(scope)
    if query:
        path += "?" + query.decode("latin-1")
    return Asked(scope["method"], path, scope["headers"], bytes(body))


async def model_in(asked: Asked) -> str | None:
    """The `model` of a JSON body; None if it names none. Raises RefusedError."""
    loads = json.loads
    try:
        body: Any = loads(asked.body) if len(asked.body) < LARGE_BODY else await asyncio.to_thread(loads, asked.body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the request body is not JSON: {error}", code="invalid_json") from None
    model = body.get("model") if isinstance(body, dict) else None
    if model is not None and not isinstance(model, str):
        raise RefusedError("model: Input should be a valid string", param="model", code="invalid_type")
    return model or None


def sticky_of(scope: Scope, versions: VersionsSection) -> str | None:
    """What all requests that belong to one version have in common; None if this one stands alone.

    Of an API key its name, or its hash: what comes out is hashed again and told to nobody.
    """
    if versions.split_by == "header" and versions.split_header is not None:
        return header_of(scope, versions.split_header.encode()) or None
    if versions.split_by != "key":
        return None
    key = key_in(scope)
    if key is not None and key.name != UNNAMED:
        return key.name
    secret = header_of(scope, b"authorization").partition(" ")[2].strip()
    return digest_of(secret).hex() if secret else None


def version_asked(scope: Scope) -> str:
    """The version that a request names in its header, empty if it leaves that to the split."""
    return header_of(scope, VERSION)
