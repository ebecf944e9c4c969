"""What a shard's process takes, as its series say."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.shard.memory import shard_facts
from tests.support.serve.statuses import shard_status


@pytest.mark.parametrize(
    ("torch", "device_bytes"),
    [
        (None, None),
        (SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False)), None),
        (SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, memory_reserved=lambda: 77)), 77),
    ],
    ids=["without torch", "without a GPU", "on a GPU"],
)
def test_the_gpus_memory_is_told_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, torch: Any, device_bytes: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    facts = shard_facts(shard_status())
    assert facts.device_bytes == device_bytes
    assert facts.status == shard_status()


def test_resident_memory_grows_with_what_is_allocated() -> None:
    before = shard_facts(shard_status()).resident_bytes
    taken = bytearray(b"x" * 2**26)
    assert shard_facts(shard_status()).resident_bytes > before + 2**25
    del taken
