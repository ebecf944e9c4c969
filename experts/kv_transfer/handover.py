"""What one router tells another of a prompt that it has computed: vLLM's `kv_transfer_params`."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ASK = "do_remote_decode"  # in a request: keep the KV cache of this prompt for somebody else
OFFER = "do_remote_prefill"  # in an answer, and in the request that makes use of it
_FILE, _TOKENS, _DIGEST, _KEEP = "file", "num_tokens", "digest", "keep"


@dataclass(frozen=True)
class Handover:
    """Where the KV cache of a prompt is."""

    name: str  # of the file
    num_tokens: int  # of the prompt, whose KV cache it is
    digest: str  # of the prompt, as `digest_of` makes it, in hex
    keep: bool = False  # several requests read it, so the first one leaves it

    def to_params(self) -> dict[str, Any]:
        """For the request that uses it."""
        return {OFFER: True, _FILE: self.name, _TOKENS: self.num_tokens, _DIGEST: self.digest, _KEEP: self.keep}

    @classmethod
    def of(cls, params: Any) -> Handover | None:
        """What `to_params` made; None for anything else."""
        if not isinstance(params, dict) or params.get(OFFER) is not True:
            return None
        name, num_tokens, digest, keep = (params.get(key) for key in (_FILE, _TOKENS, _DIGEST, _KEEP))
        if not isinstance(name, str) or type(num_tokens) is not int or not isinstance(digest, str):
            return None
        return cls(name, num_tokens, digest, keep is True)


def new_name() -> str:
    """A file's name that nobody can guess."""
    return f"{uuid.uuid4().hex}.kv"


def ask_params(name: str) -> dict[str, Any]:
    """kv_transfer_params of the request that shall leave its prompt's KV cache in the file `name`."""
    return {ASK: True, _FILE: name}


def asked_name(params: Any) -> str | None:
    """The file that a request is asked to leave behind, None if it is not."""
    if not isinstance(params, dict) or params.get(ASK) is not True or not isinstance(params.get(_FILE), str):
        return None
    return str(params[_FILE])


def digest_of(token_ids: Sequence[int], others: Iterable[str] = ()) -> bytes:
    """SHA-256 of a prompt's tokens and of what else its KV cache depends on, such as the name of an adapter."""
    return hashlib.sha256(json.dumps([list(token_ids), list(others)]).encode()).digest()
