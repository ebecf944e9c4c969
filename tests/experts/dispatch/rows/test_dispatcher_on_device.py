"""The dispatcher with the Triton row mover, over links that compute in place, faults included.

On CUDA, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch import epoch as epoch_module
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.protocol.membership import Membership
from tests.support.fake_links import WAIT_FAULTS, FakeLink, unhurried
from tests.support.small_mesh import (
    assert_matches,
    one_process,
    oracle,
    random_batch,
    replicated,
    write_checkpoint,
)

pytestmark = [pytest.mark.gpu, pytest.mark.triton]
NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, NUM_RANKS = 2, 6, 3, 24, 3


class DeviceLink(FakeLink):
    """A fake link whose rows travel as tensors on `device`."""

    def __init__(self, device: torch.device, *arguments: object) -> None:
        super().__init__(*arguments, apart=True)  # type: ignore[arg-type]
        self._on_host = self.send_tensor, self.recv_tensor
        self._on_device = self.send_tensor.to(device), self.recv_tensor.to(device)
        self.send_tensor, self.recv_tensor = self._on_device

    def wait(self, deadline_s: float) -> int:
        self._on_host[0].copy_(self._on_device[0])
        self.send_tensor, self.recv_tensor = self._on_host
        try:
            return super().wait(deadline_s)
        finally:
            self._on_device[1].copy_(self._on_host[1])
            self.send_tensor, self.recv_tensor = self._on_device


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("fault", [None, "lost", "silent", "garbage"])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_results_are_those_of_the_definition(triton_device, model, monkeypatch, num_tokens, fault, replicas):
    from experts.dispatch.rows.triton_mover import TritonRowMover

    monkeypatch.setattr(epoch_module, "pick_row_mover", TritonRowMover)
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    placement = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, replicas)
    links = {r: DeviceLink(triton_device, r, placement, shape, 5, one_process(model)) for r in range(NUM_RANKS)}
    dispatcher = Dispatcher(shape, 5, 1.0, unhurried(model))  # 13 tokens take three rounds
    dispatcher.apply(Membership(1, placement, (None,) * NUM_RANKS), dict(links), {})
    if fault is not None:
        links[1].wait_faults = [WAIT_FAULTS[fault][0]]
    checkpoint = ExpertCheckpoint.open(model)
    for layer in range(NUM_LAYERS):
        batch = random_batch(num_tokens, seed=layer)
        on_device = (t.to(triton_device) for t in (batch.x_TD, batch.weights_TK, batch.ids_TK))
        got_TD = dispatcher.forward(layer, *on_device)
        assert got_TD.device.type == triton_device.type
        assert_matches(got_TD.cpu(), oracle(checkpoint, layer, batch))
    if fault is not None and num_tokens == 13:  # one token may pass rank 1 by
        assert set(dispatcher.lost) == {1}
        assert (dispatcher.stats.fallback_pairs == 0) == (replicas == 2)


class Noting:
    """In a program's place: notes what Triton looks a compiled form up by."""

    def __init__(self, program: Any, forms: set[tuple[Any, ...]]) -> None:
        self._program = program
        self._forms = forms

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            told = [
                (argument.dtype, argument.data_ptr() % 16 == 0)
                if isinstance(argument, torch.Tensor)
                else (argument == 1, argument % 16 == 0)
                for argument in arguments
            ]
            self._forms.add((self._program.__name__, *told, *sorted(constants.items())))
            self._program[grid](*arguments, **constants)

        return launch


@pytest.mark.parametrize("num_tokens", [1, 2, 13])
def test_no_dispatch_meets_a_form_that_was_not_compiled(triton_device, model, monkeypatch, num_tokens):
    from experts.dispatch.rows import triton_mover, triton_programs

    forms: set[tuple[Any, ...]] = set()
    for name in ("pack_rows", "combine_rows"):
        monkeypatch.setattr(triton_programs, name, Noting(getattr(triton_programs, name), forms))
    monkeypatch.setattr(epoch_module, "pick_row_mover", triton_mover.TritonRowMover)
    triton_mover.warm_up.cache_clear()
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, torch.float32)
    placement = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, 1)
    links = {r: DeviceLink(triton_device, r, placement, shape, 5, one_process(model)) for r in range(NUM_RANKS)}
    dispatcher = Dispatcher(shape, 5, 1.0, unhurried(model))
    dispatcher.apply(Membership(1, placement, (None,) * NUM_RANKS), dict(links), {})
    warm = set(forms)
    assert len(warm) == 4
    links[1].wait_faults = [None, WAIT_FAULTS["lost"][0]]  # later rows are sent again, or computed on the router
    for layer in (0, 1, 0):
        batch = random_batch(num_tokens, seed=layer)
        dispatcher.forward(layer, *(t.to(triton_device) for t in (batch.x_TD, batch.weights_TK, batch.ids_TK)))
    assert forms == warm
