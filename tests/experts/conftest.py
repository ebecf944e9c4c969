"""One process that has imported vllm, from which the tests of the plug-in fork theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_zygote import Zygote


@pytest.fixture(scope="session")
def vllm_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Runs the jobs of plugin_jobs, each in a fresh process with vllm loaded and nothing registered."""
    zygote = Zygote(tmp_path_factory.mktemp("vllm") / "zygote", "engine", "plugin_jobs")
    yield zygote
    zygote.close()
