"""A router's own work in a MoE layer on a GPU, without wire and experts: plan, pack, unpack, combine.

    python -m benchmarks.gpu.router [--quick] [--device cpu]

64 and 256 tokens, top-8 of 256 experts, 8 shards, hidden 7168, bfloat16. Shards answer immediately with what the
receive buffers hold.

    eager     the dispatcher as an engine drives it: routing to the host, plan there, one launch to pack, one to combine
    fixed     messages of fixed capacity, planned on the device and launched one by one
    captured  the same, several layers in one CUDA graph

`layer_us` is a layer's time when layers follow one another and the host waits only at the end. `floor_us` is the time
the rows alone need at this run's copy ceiling. Goals: 40 microseconds per layer, 20 captured. `replicas` has every
expert on two shards, so that dispatch chooses one for each pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import median
from benchmarks.gpu.common import Ceilings, Report, absent, arguments, device_us, measure_ceilings, synchronize
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.loopback import LoopbackLink
from experts.protocol.membership import Membership
from experts.transports.base import RouterLink
from placement.placement import Placement

EAGER_GOAL_US, CAPTURED_GOAL_US = 40.0, 20.0
LAYERS = 8  # in a captured graph


class DeviceLoopback(LoopbackLink):
    """A loopback link with its rows on a device."""

    def __init__(self, rank: int, shape: LayerShape, max_rows: int, device: str) -> None:
        super().__init__(rank, shape, max_rows)
        nbytes = max_rows * shape.row_bytes
        self.send_tensor, self.recv_tensor = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))


def place(shape: LayerShape, num_ranks: int, replicas: bool) -> Placement:
    """A linear placement; `replicas` adds a second copy of every expert, half the ranks further on."""
    linear = Placement.linear(shape.num_layers, shape.num_experts, num_ranks)
    if not replicas:
        return linear
    slots_LS = np.asarray(linear.physical_to_logical_map)
    per_rank = slots_LS.shape[1] // num_ranks
    slots_LRs = slots_LS.reshape(shape.num_layers, num_ranks, per_rank)
    both_LRs = np.concatenate([slots_LRs, np.roll(slots_LRs, num_ranks // 2, axis=1)], axis=2)
    return Placement(num_ranks, 1, shape.num_experts, both_LRs.reshape(shape.num_layers, -1).astype(np.int32))


def step_of(shape: LayerShape, num_tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x [T, D], weights [T, K] and ids [T, K] of a step."""
    x_TD = torch.randn(num_tokens, shape.hidden_size, device=device).to(shape.dtype)
    ids_TK = torch.rand(num_tokens, shape.num_experts).argsort(1)[:, : shape.top_k].int().to(device)
    return x_TD, torch.rand(num_tokens, shape.top_k, device=device), ids_TK.contiguous()


def floor_us(dispatcher: Dispatcher, shape: LayerShape, num_tokens: int, ceilings: Ceilings) -> float:
    """Microseconds to read and write the rows, once to pack and once to combine, at the copy ceiling."""
    rows = dispatcher.stats.fan_out_sum // dispatcher.stats.dispatches
    return (3 * rows + num_tokens) * shape.row_bytes / ceilings.copy_bytes_per_s * 1e6


def train_us(call: Callable[[], object], device: str, layers: int, turns: int) -> float:
    """Median microseconds of one of `layers` consecutive calls."""
    times = []
    for _ in range(turns):
        synchronize(device)
        start_s = time.perf_counter()
        for _ in range(layers):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start_s) / layers * 1e6)
    return median(times)


def eager(shape: LayerShape, num_tokens: int, num_ranks: int, replicas: bool, device: str) -> tuple[Any, Dispatcher]:
    """(a call that runs one layer, its dispatcher)."""
    dispatcher = Dispatcher(shape, num_tokens, 30.0, fallback=None)
    links: dict[int, RouterLink] = {rank: DeviceLoopback(rank, shape, num_tokens, device) for rank in range(num_ranks)}
    membership = Membership(1, place(shape, num_ranks, replicas), (None,) * num_ranks)
    dispatcher.apply(membership, links, {})
    step = step_of(shape, num_tokens, device)
    return (lambda: dispatcher.forward(0, *step)), dispatcher


def fixed(shape: LayerShape, num_tokens: int, num_ranks: int, replicas: bool, device: str) -> Any:
    """A call that runs one layer of fixed capacity."""
    from experts.dispatch.captured.fixed_dispatch import FixedDispatch

    dispatch = FixedDispatch(shape, num_tokens, num_ranks, 1, replicas, torch.device(device))
    placement = place(shape, num_ranks, replicas)
    dispatch.set_placement(placement.slots_LER, placement.work_R)
    x_TD, weights_TK, ids_TK = step_of(shape, num_tokens, device)
    y_TD = torch.empty_like(x_TD)

    def layer() -> None:
        dispatch.pack(0, x_TD, weights_TK, ids_TK)
        dispatch.combine(y_TD)

    return layer


def captured(layer: Callable[[], None]) -> Callable[[], None]:
    """A call that replays LAYERS layers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            layer()
    return graph.replay


def main() -> None:
    """Print the table."""
    args = arguments(__doc__)
    device, on_cpu = args.device, args.device == "cpu"
    report = Report("gpu_router", device)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    shape = LayerShape(1, 16, 4, 64, dtype) if on_cpu else LayerShape(1, 256, 8, 7168, dtype)
    num_ranks = 4 if on_cpu else 8
    turns = 3 if on_cpu or args.quick else 30
    ceilings = measure_ceilings(device, dtype)
    print(ceilings.line())
    rows = []
    no_triton = absent("triton")
    for num_tokens in (3, 5) if on_cpu else (64, 256):
        for replicas in (False, True):
            call, dispatcher = eager(shape, num_tokens, num_ranks, replicas, device)
            for _ in range(5):
                call()
            layer_us = {"eager": train_us(call, device, LAYERS, turns)}
            floor = floor_us(dispatcher, shape, num_tokens, ceilings)
            what = f"fixed and captured, {num_tokens} tokens, {'replicas' if replicas else 'single'}"
            if no_triton is None:
                layer = fixed(shape, num_tokens, num_ranks, replicas, device)
                layer()
                layer_us["fixed"] = train_us(layer, device, LAYERS, turns)
                if on_cpu:
                    report.leave_out(what, "graphs are captured on GPUs only")
                else:
                    layer_us["captured"] = device_us(captured(layer), device, 5, turns) / LAYERS
            else:
                report.leave_out(what, no_triton)
            for mode, us in layer_us.items():
                goal = CAPTURED_GOAL_US if mode == "captured" else EAGER_GOAL_US
                rows.append(
                    {"tokens": num_tokens, "experts": "replicas" if replicas else "single", "mode": mode}
                    | {"layer_us": us, "goal_us": goal, "floor_us": floor}
                )
    report.table(f"A router's layer: top-{shape.top_k}, {num_ranks} shards, hidden {shape.hidden_size}", rows)
    report.end(ceilings=vars(ceilings))


if __name__ == "__main__":
    main()
