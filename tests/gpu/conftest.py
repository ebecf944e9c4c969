"""Which of these tests can run here: the programs' logic wherever triton is, on CUDA or in its interpreter; the rest on
CUDA only.

To run the programs' logic on a machine without a GPU: install triton and set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from experts.transports.torch_nccl import SHARE_GPUS

os.environ[SHARE_GPUS] = "1"  # in this process and all that it starts
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experts"))  # small_mesh, families


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton programs can run here; skips, saying why, where they cannot."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("torch sees no CUDA device; TRITON_INTERPRET=1 runs Triton's programs on the CPU")
