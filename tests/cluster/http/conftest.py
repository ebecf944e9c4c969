"""A real engine behind the front door, for the tests that send requests to one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from benchmarks.serving.fuzz_http.own_server import own_server


@pytest.fixture(scope="package")
def door() -> Iterator[str]:
    """The URL of a server of its own, without keys; its context has 256 tokens."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vllm")
    with own_server() as url:
        yield url
