"""Where adapters are: a folder, or a folder of an object store, with one folder for each."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from cluster.config.llm_sections import LoraSection
from cluster.http.errors import RefusedError, UnavailableError
from experts.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folders, adapter_problems
from experts.checkpoint.errors import CheckpointError, UnreachableError
from experts.checkpoint.sources.base import ModelSource
from experts.checkpoint.sources.object_store import subfolders
from experts.checkpoint.sources.opening import open_source

logger = logging.getLogger("ray.serve")

RETRY_PAUSE_S = 0.5


class AdapterMissingError(LookupError):
    """There is no adapter of this name."""


class Library:
    """The adapters that a router may load. Nothing of them is kept but files on this node."""

    def __init__(self, lora: LoraSection, max_rank: int) -> None:
        """`max_rank`: the largest rank that the engine has room for."""
        self._lora = lora
        self._max_rank = max_rank

    async def names(self) -> list[str]:
        """Names of all adapters. UnavailableError where the object store does not answer in time."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._names), self._lora.download_timeout_s)
        except UnreachableError as error:
            raise UnavailableError(str(error)) from error
        except TimeoutError as error:
            raise UnavailableError("the list of adapters did not come in time; try again") from error

    async def fetch(self, name: str) -> Path:
        """The local folder of an adapter whose files are all there.

        AdapterMissingError; RefusedError for an adapter that cannot be served; UnavailableError where the object store
        does not answer in time, or not at all.
        """
        if name in ("", ".", "..") or "/" in name or "\\" in name or name.startswith("."):
            raise AdapterMissingError(name)
        folder = await self._fetch(name)
        problems = await asyncio.to_thread(lambda: list(adapter_problems(folder, self._max_rank)))
        if problems:
            raise RefusedError(f"the adapter {name!r} cannot be served: {problems[0]}", param="model")
        return folder

    async def _fetch(self, name: str) -> Path:
        for attempt in range(1, self._lora.max_download_tries + 1):
            try:
                return await asyncio.wait_for(asyncio.to_thread(self._folder, name), self._lora.download_timeout_s)
            except UnreachableError as error:
                logger.warning("adapter %s, try %d: %s", name, attempt, error)
                last = str(error)
            except TimeoutError:
                last = f"it did not come within {self._lora.download_timeout_s:g} s (lora_config.download_timeout_s)"
                logger.warning("adapter %s, try %d: %s", name, attempt, last)
            await asyncio.sleep(RETRY_PAUSE_S * attempt)
        raise UnavailableError(f"the adapter {name!r} cannot be fetched: {last}")

    def _names(self) -> list[str]:
        if self._lora.folder is None:
            return subfolders(self._lora.dynamic_lora_loading_path)
        try:
            return [path.name for path in adapter_folders(self._lora.folder)]
        except OSError as error:
            raise UnreachableError(f"{self._lora.folder} cannot be listed: {error}") from None

    def _folder(self, name: str) -> Path:
        if self._lora.folder is not None:
            folder = self._lora.folder / name
            if not folder.is_dir():
                raise AdapterMissingError(name)
            return folder
        # Its contents are looked up each time: what is new under an old name goes to a folder of its own.
        try:
            source: ModelSource = open_source(f"{self._lora.dynamic_lora_loading_path}/{name}").resolved()
        except UnreachableError:
            raise
        except CheckpointError as error:
            raise AdapterMissingError(name) from error
        try:
            return source.fetch([file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if file in source.files()])
        except CheckpointError as error:  # it changed meanwhile, or the disk is full
            raise UnreachableError(str(error)) from error
