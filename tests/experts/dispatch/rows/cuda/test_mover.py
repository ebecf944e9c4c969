"""Rows that compiled code moves on a GPU. Its programs run here as loops over host memory, and on CUDA where it is.

Legend: T tokens, K top-k, E logical experts, R ranks, D hidden size.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch import epoch as epoch_module
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import LoopbackLink
from experts.dispatch.rows.cuda.driver import CudaDriver, Driver, DriverError
from experts.dispatch.rows.cuda.mover import CudaRowMover
from experts.native.library import data_plane
from experts.protocol.membership import Membership
from experts.transports.base import RouterLink
from placement.placement import Placement
from tests.support.fake_cuda import FakeDriver
from tests.support.fake_links import WAIT_FAULTS, FakeLink, unhurried
from tests.support.gpu_mesh import CUDA_IPC, mesh_over, router_over, run_there
from tests.support.small_mesh import (
    assert_matches,
    one_process,
    oracle,
    random_batch,
    replicated,
    write_checkpoint,
)

pytestmark = pytest.mark.skipif(data_plane() is None, reason="no C++ compiler")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, NUM_RANKS = 2, 6, 3, 24, 3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
WHERE = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


class DeviceLoopback(LoopbackLink):
    """A loopback link with its rows apart from its messages."""

    def __init__(self, rank: int, shape: LayerShape, max_rows: int, device: str) -> None:
        super().__init__(rank, shape, max_rows)
        nbytes = max_rows * shape.row_bytes
        self.send_tensor, self.recv_tensor = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))


@pytest.fixture(autouse=True)
def nothing_queued() -> Iterator[None]:
    yield
    FakeDriver().forget()


def driver_on(device: str) -> Driver:
    return FakeDriver() if device == "cpu" else CudaDriver()


def loopbacks(
    shape: LayerShape, placement: Placement, max_rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Dispatcher, dict[int, DeviceLoopback]]:
    """A dispatcher with the mover under test and links that answer with what is in their memory."""
    driver = driver_on(device)

    def pick(*arguments: object) -> CudaRowMover:
        return CudaRowMover(*arguments, driver=driver)  # type: ignore[arg-type]

    monkeypatch.setattr(epoch_module, "pick_row_mover", pick)
    links = {rank: DeviceLoopback(rank, shape, max_rows, device) for rank in range(placement.num_ranks)}
    dispatcher = Dispatcher(shape, max_rows, 5.0, None)
    dispatcher.apply(Membership(1, placement, (None,) * placement.num_ranks), dict(links), {})
    return dispatcher, links


def rows_of(data: torch.Tensor, count: int, shape: LayerShape) -> torch.Tensor:
    return data[: count * shape.row_bytes].view(shape.dtype).view(count, shape.hidden_size)


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize(("hidden", "num_tokens"), [(8, 1), (24, 13), (2056, 5), (1024, 40)])
def test_rows_there_and_sums_back(
    device: str, dtype: torch.dtype, hidden: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's message has its tokens' rows, in order; y is the float32 sum of what came back, rounded once."""
    K, R = 5, 4
    shape = LayerShape(1, 16, K, hidden, dtype)
    dispatcher, links = loopbacks(shape, Placement.linear(1, 16, R), num_tokens + 1, device, monkeypatch)
    generator = torch.Generator().manual_seed(hidden + num_tokens)
    for _ in range(3):  # buffers are used again
        x_TD = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        ids_TK = torch.rand(num_tokens, 16, generator=generator).argsort(1)[:, :K].int()
        weights_TK = torch.rand(num_tokens, K, generator=generator)
        answers = {rank: torch.randn(num_tokens, hidden, generator=generator).to(dtype) for rank in range(R)}
        for rank, rows_TD in answers.items():
            rows_of(links[rank].recv_tensor, num_tokens, shape).copy_(rows_TD)
        y_TD = dispatcher.forward(0, x_TD.to(device), weights_TK.to(device), ids_TK.to(device))
        if device == "cpu":
            FakeDriver().wait()
        expected_TD = torch.zeros(num_tokens, hidden)
        at_R = dict.fromkeys(range(R), 0)
        for token in range(num_tokens):
            for rank in dict.fromkeys((ids_TK[token] // 4).tolist()):
                sent_MD = rows_of(links[rank].send_tensor, num_tokens, shape).cpu()
                assert torch.equal(sent_MD[at_R[rank]], x_TD[token])
                expected_TD[token] += answers[rank][at_R[rank]].float()
                at_R[rank] += 1
        assert torch.equal(y_TD.cpu(), expected_TD.to(dtype))
    assert dispatcher.stats.dispatches == 3
    assert dispatcher.stats.native.bytes_sent > 0  # compiled code posted
    assert (dispatcher.lost, dispatcher.stats.failovers) == ({}, 0)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves go to even, infinity and NaN stay, and what is too large becomes infinite."""
    shape = LayerShape(1, 2, 2, 8, dtype)
    dispatcher, links = loopbacks(shape, Placement.linear(1, 2, 2), 1, "cpu", monkeypatch)
    largest, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    first = torch.tensor([[1.0, 1 + step, 1.0, largest, float("inf"), float("nan"), float("inf"), -0.0]]).to(dtype)
    second = torch.tensor([[step / 2, step / 2, step * 0.75, largest, 1.0, 1.0, -float("inf"), -0.0]]).to(dtype)
    for rank, rows in enumerate((first, second)):
        rows_of(links[rank].recv_tensor, 1, shape).copy_(rows)
    x_TD = torch.zeros(1, 8, dtype=dtype)
    y_TD = dispatcher.forward(0, x_TD, torch.ones(1, 2), torch.tensor([[0, 1]], dtype=torch.int32))
    FakeDriver().wait()
    torch.testing.assert_close(y_TD, (0.0 + first.float() + second.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
def test_other_dtypes_and_strides_of_the_routing(ids: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LayerShape(1, 8, 2, 8, FLOAT32)
    dispatcher, links = loopbacks(shape, Placement.linear(1, 8, 2), 4, "cpu", monkeypatch)
    x_TD = torch.randn(8, 6).t()[:3]  # [3, 8], neither contiguous nor aligned
    ids_TK = torch.tensor([[0, 4], [1, 5], [7, 2]]).t().contiguous().t().to(ids)
    dispatcher.forward(0, x_TD[:, :8], torch.ones(3, 2, dtype=torch.float64), ids_TK)
    assert torch.equal(rows_of(links[0].send_tensor, 3, shape), x_TD)
    assert torch.equal(rows_of(links[1].send_tensor, 3, shape), x_TD)


@pytest.mark.parametrize("calls", range(8))
def test_a_driver_that_fails_is_named(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent or summed by halves: the layer ends with the driver's error, and the next one works."""
    shape = LayerShape(1, 8, 2, 8, FLOAT32)
    dispatcher, _ = loopbacks(shape, Placement.linear(1, 8, 2), 4, "cpu", monkeypatch)
    arguments = (torch.ones(2, 8), torch.ones(2, 2), torch.tensor([[0, 4], [1, 5]], dtype=torch.int32))
    FakeDriver().fail_after(calls)
    try:
        if calls < 7:
            with pytest.raises(DriverError, match="made-up error 700"):
                dispatcher.forward(0, *arguments)
        else:  # a layer calls the driver seven times
            sums = [dispatcher.forward(0, *arguments)]
            FakeDriver().wait()  # while the sums' memory is there
    finally:
        FakeDriver().fail_after(-1)
    sums = [dispatcher.forward(0, *arguments)]
    FakeDriver().wait()
    assert not sums[0].any()  # what the links answered


class HostLink(FakeLink):
    """A fake link, which computes in place, with rows apart; its `native` is for a mover that looks for one."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments, apart=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("fault", [None, "lost", "silent", "garbage"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_links_without_compiled_code_are_python_s(
    model: Path, replicas: int, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it plans, and torch packs and combines: the path that a failed attempt takes too."""
    monkeypatch.setattr(
        epoch_module, "pick_row_mover", lambda *arguments: CudaRowMover(*arguments, driver=FakeDriver())
    )
    shape = LayerShape(NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, FLOAT32)
    placement = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, replicas)
    links: Mapping[int, RouterLink] = {
        rank: HostLink(rank, placement, shape, 5, one_process(model)) for rank in range(NUM_RANKS)
    }
    dispatcher = Dispatcher(shape, 5, 1.0, unhurried(model))
    dispatcher.apply(Membership(1, placement, (None,) * NUM_RANKS), dict(links), {})
    if fault is not None:
        links[1].wait_faults = [WAIT_FAULTS[fault][0]]  # type: ignore[attr-defined]
    checkpoint = ExpertCheckpoint.open(model)
    for layer in range(NUM_LAYERS):
        batch = random_batch(13, seed=layer)
        assert_matches(
            dispatcher.forward(layer, batch.x_TD, batch.weights_TK, batch.ids_TK), oracle(checkpoint, layer, batch)
        )


@pytest.mark.parametrize("kind", ["shm_split", CUDA_IPC])
@pytest.mark.parametrize("replicas", [1, 2])
def test_real_shards_and_one_that_is_killed(
    model: Path, kind: str, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a real pair, in compiled code: rows, sums, several rounds, a dead shard, and the epoch after."""
    if kind == "shm_split":
        driver = FakeDriver()
        monkeypatch.setattr(epoch_module, "pick_row_mover", lambda *arguments: CudaRowMover(*arguments, driver=driver))
    with mesh_over(kind, model, replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, replicas)) as mesh:
        router = router_over(kind, mesh, dispatch_timeout_ms=5000, max_rows_per_dispatch=16)
        assert set(router.status().transports.values()) == {kind}

        def step(seed: int, num_tokens: int) -> None:
            for layer in range(NUM_LAYERS):
                batch = random_batch(num_tokens, seed=seed + layer)
                got_TD = run_there(router, layer, batch)
                if kind == "shm_split":
                    driver.wait()
                assert_matches(got_TD, oracle(mesh.checkpoint, layer, batch))

        for num_tokens in (0, 1, 7, 16, 50):
            step(num_tokens, num_tokens)
        assert router.status().failovers == 0
        mesh.shards[1].signal(signal.SIGKILL)
        step(100, 20)
        assert set(router.status().lost) == {1}
        assert (router.status().fallback_pairs == 0) == (replicas == 2)
        step(200, 20)
