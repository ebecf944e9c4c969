"""Fixtures for tests of the data plane: a process that has imported vllm, and a device for Triton's programs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from experts.transports.nccl_sharing import SHARE_GPUS
from tests.support.zygote.engine_zygote import Zygote

os.environ[SHARE_GPUS] = "1"  # in this process and its children


@pytest.fixture(scope="session")
def vllm_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Runs jobs of plugin_jobs, each in a fresh process with vllm loaded and nothing registered."""
    zygote = Zygote(tmp_path_factory.mktemp("vllm") / "zygote", "engine", "plugin_jobs")
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device for Triton's programs on this machine; skips the test, with the reason, if there is none."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("torch sees no CUDA device; TRITON_INTERPRET=1 runs Triton's programs on the CPU")
