"""A model whose experts are copied, two shards that have them, and one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.shard.server import ShardServer
from tests.support.copying_shards import ALL, copies_model, server
from tests.support.small_mesh import Shard, start_shards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules with models of their own name them so, too."""
    return copies_model(tmp_path_factory.mktemp("model") / "copies")


@pytest.fixture(scope="module")
def sources(model: Path) -> Iterator[dict[int, Shard]]:
    """Two shards that hold everything; tests leave them alive."""
    shards = start_shards(model, ALL, [0, 1])
    yield shards
    for shard in shards.values():
        shard.end()


@pytest.fixture
def target(model: Path) -> Iterator[ShardServer]:
    """An empty shard in this process."""
    with server(model, 2) as started:
        yield started
