"""Adapters in a folder and in an object store (fsspec's memory filesystem): names, files, and what cannot be had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from cluster.adapters import library as library_module
from cluster.adapters.library import AdapterMissingError, Library
from cluster.config.llm_sections import LoraSection
from cluster.http.errors import RefusedError, UnavailableError
from experts.checkpoint.errors import UnreachableError
from experts.checkpoint.sources.object_store import HOME_VARIABLE, ObjectStoreSource
from tests.support.random_adapters import write_files
from tests.support.waiting import asynchronous

ATTENTION = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("good", "other"):
        write_files(tmp_path / "adapters" / name, ATTENTION, ["q_proj"])
    (tmp_path / "adapters" / "README.md").write_text("not an adapter")
    (tmp_path / "adapters" / ".cache").mkdir()
    return tmp_path / "adapters"


def library(path: Path | str, max_rank: int = 16, **options: Any) -> Library:
    return Library(LoraSection(dynamic_lora_loading_path=str(path), **options), max_rank)


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A filesystem in memory in place of S3, with the same adapters below bucket/adapters."""
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/bucket/adapters/{path.relative_to(folder)}", path.read_bytes())
    monkeypatch.setattr(ObjectStoreSource, "_filesystem", lambda _: Rootless(memory))
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    yield memory
    memory.rm("/bucket", recursive=True)


class Rootless:
    """Names as S3 has them, without the slash that fsspec's memory filesystem puts first."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def find(self, path: str, detail: bool) -> dict[str, Any]:
        return {key.lstrip("/"): self.info(key) for key in self._memory.find(path, detail=detail)}

    def info(self, path: str) -> dict[str, Any]:
        info = self._memory.info(path)
        return {**info, "mtime": info["created"]}


@asynchronous
async def test_a_folders_adapters(folder: Path) -> None:
    assert await library(folder).names() == ["good", "other"]
    assert await library(folder).fetch("good") == folder / "good"


@asynchronous
async def test_an_object_stores_adapters(store: Any, folder: Path) -> None:
    lib = library("s3://bucket/adapters/")
    assert await lib.names() == ["good", "other"]
    fetched = await lib.fetch("good")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (fetched / name).read_bytes() == (folder / "good" / name).read_bytes()


@asynchronous
async def test_what_is_new_in_an_object_store_is_seen_under_another_path(store: Any, folder: Path) -> None:
    """vLLM keeps what it has read of a path."""
    lib = library("s3://bucket/adapters")
    first = await lib.fetch("good")
    store.pipe("/bucket/adapters/good/adapter_config.json", b'{"r": 4, "lora_alpha": 80, "target_modules": ["q_proj"]}')
    assert await lib.fetch("good") != first


@pytest.mark.parametrize("name", ["", ".", "..", "../adapters/good", "good/..", "none", ".cache", "good\\.."])
@asynchronous
async def test_what_is_no_adapter_is_missing(folder: Path, store: Any, name: str) -> None:
    for path in (folder, "s3://bucket/adapters"):
        with pytest.raises(AdapterMissingError):
            await library(path).fetch(name)


@asynchronous
async def test_an_adapter_that_cannot_be_served_is_refused(folder: Path) -> None:
    with pytest.raises(RefusedError, match=r"its rank is 4, more than max_lora_rank \(2\)"):
        await library(folder, max_rank=2).fetch("good")


@asynchronous
async def test_a_silent_store_is_asked_again_and_then_given_up(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(source: ObjectStoreSource) -> Any:
        asked.append(str(source))
        raise UnreachableError("no route")

    monkeypatch.setattr(library_module, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(ObjectStoreSource, "resolved", unreachable)
    with pytest.raises(UnavailableError, match="'good' cannot be fetched: no route"):
        await library("s3://bucket/adapters", max_download_tries=2).fetch("good")
    assert asked == ["s3://bucket/adapters/good"] * 2


@asynchronous
async def test_a_fetch_has_a_time_limit(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(ObjectStoreSource, "resolved", lambda _: released.wait(60))
    monkeypatch.setattr(library_module, "subfolders", lambda _: released.wait(60))
    monkeypatch.setattr(library_module, "RETRY_PAUSE_S", 0.0)
    try:
        with pytest.raises(UnavailableError, match=r"did not come within 0\.05 s"):
            await library("s3://bucket/adapters", download_timeout_s=0.05, max_download_tries=1).fetch("good")
        with pytest.raises(UnavailableError, match="the list of adapters did not come in time"):
            await library("s3://bucket/adapters", download_timeout_s=0.05).names()
    finally:
        released.set()
