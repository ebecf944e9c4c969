"""Chooses a kernel: by name, or the fastest in a trial with the real shape on this machine.

To add a kernel:

1. Subclass `ExpertKernel` (base.py) in the folder of the library that it uses; `StackedKernel` (stacked.py) already
   stores plain weights as stacked tensors. For quantized weights, `QuantizedKernel` or `QuantizedStackKernel`
   (quantized.py). Define `name`, `supports`, `forward` and, without a stack or with packing of its own, `_pack`,
   `_weight_tensors` and `_packing`, without which shards read copies from the checkpoint.
2. Import a library that may be missing inside functions only, and let `supports` return why it cannot run.
3. Add the class to `KERNELS` or `QUANTIZED_KERNELS` below; "auto" then tries it.
4. tests/experts/kernels/test_kernels.py runs every entry of `KERNELS`. Add a quantized kernel and its formats to the
   cases at the top of test_quantized.py.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import fields, replace

import torch

from experts.checkpoint.weight_format import QuantizedExpert, WeightFormat
from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.native.kernel import NativeKernel
from experts.kernels.quantized import QuantizedKernel, QuantizedShape, random_quantized
from experts.kernels.torch.dequant import TorchDequantKernel
from experts.kernels.torch.grouped_mm import GroupedMMKernel
from experts.kernels.torch.loop import TorchLoopKernel
from experts.kernels.triton.mlp import TritonMlpKernel
from experts.kernels.triton.quantized import TritonQuantizedKernel
from experts.kernels.vllm.cpu import VllmCpuKernel
from experts.kernels.vllm.quantized import VllmFp8Kernel, VllmInt4Kernel, VllmMxfp4Kernel
from experts.kernels.vllm.triton import VllmTritonKernel
from experts.model.spec import ExpertWeights

logger = logging.getLogger(__name__)

KERNELS: dict[str, type[ExpertKernel]] = {
    kernel.name: kernel
    for kernel in (NativeKernel, VllmCpuKernel, VllmTritonKernel, TritonMlpKernel, GroupedMMKernel, TorchLoopKernel)
}

QUANTIZED_KERNELS: dict[str, type[QuantizedKernel]] = {
    kernel.name: kernel
    for kernel in (TritonQuantizedKernel, VllmFp8Kernel, VllmInt4Kernel, VllmMxfp4Kernel, TorchDequantKernel)
}

TRIAL_ROWS = (16, 64, 1, 256)  # the most telling first, in case time runs out
TRIAL_PAIRS_PER_ROW = 4
TRIAL_WEIGHT_BYTES = 64 << 20  # more than a last-level cache, if the shape has that much
TRIAL_WEIGHT_BYTES_CUDA = 512 << 20  # the last-level cache of a GPU is as large as the 64 MiB above
TRIAL_TIMEOUT_S = 1.4
TRIAL_TURNS = 6  # after one warm-up turn

_verdicts: dict[tuple[object, ...], str] = {}


def pick_kernel(shape: KernelShape, name: str = "auto", as_bytes: bool = False) -> ExpertKernel:
    """A kernel for `shape`, with no slot set yet; with `as_bytes` one whose slots can be copied as bytes.

    `name` is a key of `KERNELS` (for a QuantizedShape, of `QUANTIZED_KERNELS`) or "auto". "auto" times each kernel that
    supports the shape on a few row counts (under 2 s in all, compilation aside), logs a table, and takes the one with
    the smallest geometric mean; the process remembers the choice. Raises ValueError for an unknown name or one that
    does not support the shape.
    """
    known = kernels_for(shape)
    if name != "auto" and name not in known:
        raise ValueError(f"kernel {name!r} is unknown, expected auto or one of {', '.join(known)}")
    if as_bytes:
        known = {each: kernel for each, kernel in known.items() if kernel.copies_as_bytes()}
        if name not in ("auto", *known):
            told = f"expected auto or one of {', '.join(known)}"
            raise ValueError(f"kernel {name!r} cannot be offloaded: its slots cannot be copied as bytes; {told}")
    if name != "auto":
        return known[name](shape)
    key = (shape, torch.get_num_threads(), as_bytes)
    if key not in _verdicts:
        _verdicts[key] = _measure(shape, known)
        if shape.device_type == "cuda":
            torch.cuda.empty_cache()  # what the trial took, which a router on the same GPU may need
    return known[_verdicts[key]](shape)


def keep_quantized(
    shape: KernelShape, form: WeightFormat | None, name: str = "auto", as_bytes: bool = False
) -> KernelShape:
    """The shape to build a kernel for if a checkpoint stores experts in `form` (None: plain floats).

    A QuantizedShape if `name` is a kernel for quantized weights or, with "auto", if one can serve it on the GPU (with
    `as_bytes`: one whose slots can be copied as bytes).
    Else `shape` itself: weights become plain floats when they are loaded, because CPUs compute faster with those.
    """
    if form is None or name in KERNELS:
        return shape
    quantized = QuantizedShape(**{f.name: getattr(shape, f.name) for f in fields(shape)}, format=form)
    if name in QUANTIZED_KERNELS:
        return quantized
    if shape.device_type == "cpu":
        return shape
    reasons = {
        kernel: candidate.supports(quantized)
        for kernel, candidate in QUANTIZED_KERNELS.items()
        if candidate.copies_as_bytes() or not as_bytes
    }
    if None in reasons.values():
        return quantized
    logger.warning("%s weights become %s when they are loaded: %s", form.name, shape.dtype, reasons)
    return shape


def kernels_for(shape: KernelShape) -> Mapping[str, type[ExpertKernel]]:
    """The kernels by name: for plain weights, or for quantized weights if `shape` is a QuantizedShape."""
    return QUANTIZED_KERNELS if isinstance(shape, QuantizedShape) else KERNELS


def random_weights(shape: KernelShape, generator: torch.Generator | None = None) -> ExpertWeights | QuantizedExpert:
    """One random expert of `shape`, on the CPU, scaled so that activations keep their size."""
    if isinstance(shape, QuantizedShape):
        return random_quantized(shape, generator)
    D, I = shape.hidden_size, shape.intermediate_size

    def randn(*size: int, scale: float) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(shape.dtype)

    return ExpertWeights(
        w13_2ID=randn(2 * I, D, scale=D**-0.5),
        w2_DI=randn(D, I, scale=I**-0.5),
        b13_2I=randn(2 * I, scale=0.1) if shape.has_bias else None,
        b2_D=randn(D, scale=0.1) if shape.has_bias else None,
    )


def random_pairs(
    num_rows: int, num_slots: int, pairs_per_row: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row_offsets_M1, slots_N, weights_N): ragged pairs, on average `pairs_per_row`; no slot occurs twice in a row."""
    counts_M = torch.randint(0, 2 * min(pairs_per_row, num_slots // 2 or 1) + 1, (num_rows,), generator=generator)
    counts_M = counts_M.clamp(max=num_slots)
    order_MS = torch.rand(num_rows, num_slots, generator=generator).argsort(dim=1)
    slots_N = order_MS[torch.arange(num_slots) < counts_M[:, None]].int()
    row_offsets_M1 = torch.zeros(num_rows + 1, dtype=torch.int32)
    row_offsets_M1[1:] = counts_M.cumsum(0)
    return row_offsets_M1, slots_N, torch.rand(slots_N.shape[0], generator=generator)


def trial_shape(shape: KernelShape) -> KernelShape:
    """`shape` with fewer slots and layers, so that its weights fit the trial's bytes."""
    nbytes = TRIAL_WEIGHT_BYTES if shape.device_type == "cpu" else TRIAL_WEIGHT_BYTES_CUDA
    slots = max(1, min(shape.num_slots, nbytes // shape.expert_bytes))
    layers = max(1, min(shape.num_layers, nbytes // (slots * shape.expert_bytes)))
    return replace(shape, num_slots=slots, num_layers=layers)


def _measure(shape: KernelShape, candidates: Mapping[str, type[ExpertKernel]]) -> str:
    """Name of the fastest kernel; logs each candidate with its times, or why it was passed over."""
    reasons = {name: kernel_class.supports(shape) for name, kernel_class in candidates.items()}  # may compile
    start_s = time.monotonic()
    trial = trial_shape(shape)
    weights = random_weights(trial, torch.Generator().manual_seed(0))
    kernels: dict[str, ExpertKernel] = {}
    lines = []
    for name, kernel_class in candidates.items():
        reason = reasons[name]
        if reason is None:
            try:
                kernel = kernel_class(trial)
                for layer in range(trial.num_layers):
                    for slot in range(trial.num_slots):
                        kernel.set_slot(layer, slot, weights)
                kernels[name] = kernel
            except Exception as error:  # pass over a candidate that breaks, and log the reason
                reason = f"failed to start: {error}"
        if reason is not None:
            lines.append(f"  {name:12} passed over: {reason}")
    if trial.device_type != "cpu":
        # Call each size once before the trial: compilation would use up its time and count against the kernel.
        alive = _time_kernels(kernels, trial, deadline_s=math.inf, problems=lines)
        kernels, start_s = {name: kernels[name] for name in alive}, time.monotonic()
    times_us = _time_kernels(kernels, trial, deadline_s=start_s + TRIAL_TIMEOUT_S, problems=lines)
    if not times_us:
        raise ValueError(f"no kernel can serve {shape}:\n" + "\n".join(lines))
    score = {name: math.exp(statistics.fmean(math.log(t) for t in row.values())) for name, row in times_us.items()}
    best = min(score, key=lambda name: score[name])
    for name in sorted(score, key=lambda name: score[name]):
        cells = "".join(f"{rows:6} rows {time_us:9.0f} us" for rows, time_us in times_us[name].items())
        lines.insert(0 if name == best else len(lines), f"  {name:12}{cells}{'  <- chosen' if name == best else ''}")
    logger.info(
        "kernels for hidden %d, width %d, %d slots, %s on %s, %d threads (measured in %.1f s):\n%s",
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_slots,
        shape.dtype,
        shape.device,
        torch.get_num_threads(),
        time.monotonic() - start_s,
        "\n".join(lines),
    )
    return best


def _time_kernels(
    kernels: dict[str, ExpertKernel], trial: KernelShape, deadline_s: float, problems: list[str]
) -> dict[str, dict[int, float]]:
    """Smallest time of a call in microseconds, by kernel and row count. The kernels take turns until `deadline_s`.

    The smallest of few samples, because shards start side by side, and a disturbance only ever adds to a time.

    A kernel that raises is removed and named in `problems`. The first row count is always measured, each further one
    only if all kernels are likely to finish before the deadline.
    """
    generator = torch.Generator().manual_seed(0)
    alive = dict(kernels)
    times_us: dict[str, dict[int, float]] = {name: {} for name in kernels}
    last_rows, last_round_s = 0, 0.0
    for rows in TRIAL_ROWS:
        if last_rows and time.monotonic() + 2 * last_round_s * rows / last_rows > deadline_s:
            break
        pairs = random_pairs(rows, trial.num_slots, TRIAL_PAIRS_PER_ROW, generator)
        rows_MD = torch.randn(rows, trial.hidden_size, generator=generator).to(trial.device, trial.dtype)
        out_MD = torch.empty_like(rows_MD)
        samples: dict[str, list[float]] = {name: [] for name in alive}
        for turn in range(TRIAL_TURNS + 1):
            round_start_s = time.monotonic()
            for name, kernel in list(alive.items()):
                try:
                    time_us = _time_call(kernel, turn % trial.num_layers, rows_MD, pairs, out_MD)
                except Exception as error:
                    problems.append(f"  {name:12} passed over: failed with {rows} rows: {error}")
                    del alive[name], times_us[name]
                    continue
                samples[name].append(time_us)
            last_round_s = time.monotonic() - round_start_s
            if time.monotonic() + last_round_s > deadline_s:
                break
        for name in alive:
            warm = samples[name][1:] or samples[name]
            times_us[name][rows] = min(warm)
        last_rows = rows
    return times_us


def _time_call(
    kernel: ExpertKernel,
    layer: int,
    rows_MD: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out_MD: torch.Tensor,
) -> float:
    """Microseconds of one call, including the device's work; with one CPU thread, that thread's CPU time."""
    on_cuda = rows_MD.is_cuda
    clock = time.thread_time if torch.get_num_threads() == 1 and not on_cuda else time.perf_counter
    if on_cuda:
        torch.cuda.synchronize(rows_MD.device)
    start_s = clock()
    kernel.forward(layer, rows_MD, *pairs, out_MD)
    if on_cuda:
        torch.cuda.synchronize(rows_MD.device)
    return (clock() - start_s) * 1e6
