"""From a name to a source."""

from __future__ import annotations

import os
import re
from pathlib import Path

from experts.checkpoint.errors import GGUF, CheckpointError
from experts.checkpoint.sources.base import ModelSource
from experts.checkpoint.sources.folder import FolderSource

OBJECT_STORES = ("s3", "gs")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# The hub's rules for names; huggingface_hub checks the rest (no `--`, no `..`, at most 96 characters).
_HUB_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./+-]+))?", re.ASCII)


def is_remote_name(text: str) -> bool:
    """Whether `text` is a URL, or may be a hub id if there is no such folder."""
    return _URL.fullmatch(text) is not None or _HUB_ID.fullmatch(text) is not None


def open_source(model: str | os.PathLike[str]) -> ModelSource:
    """The source that `model` names: an existing folder, an s3:// or gs:// folder, a hub id, or else a folder that does
    not exist. Touches no network. CheckpointError for a URL of another kind, or a GGUF file.
    """
    if str(model).lower().endswith(".gguf"):
        raise CheckpointError(f"{model}: {GGUF}")
    if isinstance(model, os.PathLike):
        return FolderSource(Path(model))
    url = _URL.fullmatch(model)
    if url is not None:
        if url[1] not in OBJECT_STORES or not url[2].strip("/"):
            raise CheckpointError(
                f"{model!r}: expected a folder, a Hugging Face id (org/name, org/name@revision), "
                f"{' or '.join(f'{scheme}://bucket/folder' for scheme in OBJECT_STORES)}"
            )
        from experts.checkpoint.sources.object_store import ObjectStoreSource

        return ObjectStoreSource.parse(url[1], url[2])
    hub = _HUB_ID.fullmatch(model)
    if hub is not None and not Path(model).exists():
        from experts.checkpoint.sources.hub import HubSource

        return HubSource(hub[1], hub[2])
    return FolderSource(Path(model))


def local_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of this node where a model's files are, or are going to be; config.json and the index are there.

    CheckpointError if they cannot be had.
    """
    source = open_source(model).resolved()
    return source.fetch(source.facts())
