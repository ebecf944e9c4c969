"""The choice of a kernel: by name, by measurement, around candidates that refuse or break."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from experts.kernels import KERNELS, ExpertKernel, KernelShape, pick, pick_kernel
from experts.kernels.torch.loop import TorchLoopKernel
from experts.model.spec import ActivationSpec
from experts.protocol.settings import NOT_OFFLOADED

SHAPE = KernelShape(2, 4, 64, 32, ActivationSpec("silu"))


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch):
    monkeypatch.setattr(pick, "_verdicts", {})


class RefusingKernel(TorchLoopKernel):
    name = "refusing"

    @classmethod
    def supports(cls, shape):
        return "it does not like this shape"


class BreakingKernel(TorchLoopKernel):
    name = "breaking"

    def forward(self, *args):
        raise RuntimeError("broken instruction")


def test_by_name():
    assert pick_kernel(SHAPE, "torch_loop").name == "torch_loop"
    with pytest.raises(ValueError, match=r"'nonsense' is unknown, expected auto or one of .*torch_loop"):
        pick_kernel(SHAPE, "nonsense")


def test_a_named_kernel_that_cannot_serve_the_shape_says_why(monkeypatch):
    monkeypatch.setitem(KERNELS, "refusing", RefusingKernel)
    with pytest.raises(ValueError, match=r"'refusing' cannot serve .*it does not like this shape"):
        pick_kernel(SHAPE, "refusing")


class SecretKernel(TorchLoopKernel):
    name = "secret"
    _packing = ExpertKernel._packing


def test_only_kernels_that_can_be_copied_are_offloaded(monkeypatch):
    monkeypatch.setattr(pick, "KERNELS", {k.name: k for k in (SecretKernel, TorchLoopKernel)})
    assert pick_kernel(SHAPE, "secret").layout == ""
    with pytest.raises(ValueError, match=r"'secret' cannot be offloaded: .*; expected auto or one of torch_loop"):
        pick_kernel(SHAPE, "secret", as_bytes=True)
    assert pick_kernel(SHAPE, as_bytes=True).name == "torch_loop"
    monkeypatch.setattr(pick, "KERNELS", {"secret": SecretKernel})
    assert pick_kernel(SHAPE).name == "secret", "a verdict is of the candidates that were asked for"


def test_configs_refuse_the_kernels_that_cannot_be_copied():
    kernels = {**KERNELS, **pick.QUANTIZED_KERNELS}
    assert {name for name, kernel in kernels.items() if not kernel.copies_as_bytes()} == set(NOT_OFFLOADED)


def test_auto_logs_a_table_and_passes_over_what_refuses_or_breaks(monkeypatch, caplog):
    monkeypatch.setattr(pick, "KERNELS", {k.name: k for k in (RefusingKernel, BreakingKernel, TorchLoopKernel)})
    with caplog.at_level(logging.INFO, logger="experts.kernels.pick"):
        kernel = pick_kernel(SHAPE)
    assert kernel.name == "torch_loop"
    assert kernel.shape == SHAPE
    assert "refusing     passed over: it does not like this shape" in caplog.text
    assert "breaking     passed over: failed with 16 rows: broken instruction" in caplog.text
    assert "<- chosen" in caplog.text


def test_the_verdict_is_kept_for_the_process(monkeypatch):
    chosen = pick_kernel(SHAPE).name
    monkeypatch.setattr(pick, "_measure", lambda shape: pytest.fail("measured again"))
    assert pick_kernel(SHAPE).name == chosen


def test_nothing_fits(monkeypatch):
    monkeypatch.setattr(pick, "KERNELS", {"refusing": RefusingKernel})
    with pytest.raises(ValueError, match=r"no kernel can serve .*\n.*it does not like this shape"):
        pick_kernel(SHAPE)


def test_a_missing_device_is_a_reason():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    shape = dataclasses.replace(SHAPE, device="cuda", dtype=torch.bfloat16)
    assert all(kernel.supports(shape) is not None for kernel in KERNELS.values())


def test_the_trial_is_cut_to_its_bytes():
    huge = KernelShape(60, 64, 7168, 2048, ActivationSpec("silu"), dtype=torch.bfloat16)
    trial = pick.trial_shape(huge)
    assert (trial.num_layers, trial.num_slots) == (1, 1)  # one such expert is more than the trial's bytes
    middling = pick.trial_shape(dataclasses.replace(huge, hidden_size=2048, intermediate_size=768))
    assert middling.num_slots == pick.TRIAL_WEIGHT_BYTES // middling.expert_bytes
    small = pick.trial_shape(SHAPE)
    assert (small.num_layers, small.num_slots) == (2, 4)


@pytest.mark.parametrize("field", ["num_layers", "num_slots", "hidden_size", "intermediate_size"])
def test_impossible_shapes_are_named(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        dataclasses.replace(SHAPE, **{field: 0})
    with pytest.raises(ValueError, match=r"dtype is torch.int8"):
        dataclasses.replace(SHAPE, dtype=torch.int8)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        dataclasses.replace(SHAPE, activation=ActivationSpec("relu"))
