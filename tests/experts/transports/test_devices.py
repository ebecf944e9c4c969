"""Names of devices that mean the same GPU in every thread."""

from __future__ import annotations

import pytest
import torch

from experts.transports.devices import with_index


def test_a_gpu_without_index_is_the_calling_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index("cuda") == "cuda:3"
    assert with_index("cuda:1") == "cuda:1"
    assert with_index("cpu") == "cpu"
