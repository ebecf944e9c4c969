"""Kernels against a float64 oracle: random experts, rows and pairs, outputs full of NaN."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from experts.kernels import KERNELS, ExpertKernel, KernelShape
from experts.kernels.pick import kernels_for, random_pairs, random_weights
from experts.model.spec import ActivationSpec, ExpertWeights

ACTIVATIONS = {
    "silu": ActivationSpec("silu"),
    "gelu": ActivationSpec("gelu"),
    "gelu_tanh": ActivationSpec("gelu_tanh"),
    "swigluoai": ActivationSpec("swigluoai", alpha=1.702, limit=7.0),
    "swigluoai_tight": ActivationSpec("swigluoai", alpha=1.3, limit=0.5),
    "swigluoai_open": ActivationSpec("swigluoai", alpha=1.702, limit=None),
}
# float32: sums of a few hundred products. Half precision: inputs are exact in both, so what is left is rounding the
# hidden activation, and each kernel's own steps, to 8 (11) bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BASE = KernelShape(2, 6, 64, 96, ACTIVATIONS["silu"])


def each_kernel(shapes: Mapping[str, KernelShape]) -> pytest.MarkDecorator:
    """Parametrize `name` and `shape`: every shape, by its label, with every kernel that can serve it on this machine.

    What a kernel refuses is not collected. Each file has one test of what each kernel serves: it fails if a kernel
    serves less than it should, and skips, with the reason, a kernel that cannot run here at all.
    """
    cases = []
    for label, shape in shapes.items():
        for name, kernel in kernels_for(shape).items():
            if kernel.supports(shape) is None:
                marks = [pytest.mark.triton] if name.startswith("triton") else []
                marks += [pytest.mark.gpu] if shape.device_type == "cuda" else []
                cases.append(pytest.param(name, shape, id=f"{name}-{label}", marks=marks))
    return pytest.mark.parametrize(("name", "shape"), cases)


def activation_f64(spec: ActivationSpec, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """From its formula."""
    if spec.kind == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if spec.kind == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up
    if spec.kind == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    return gate / (1 + torch.exp(-spec.alpha * gate)) * (up + 1)


def oracle(shape, experts, rows_MD, offsets, slots, weights):
    """float64, pair by pair, from the formulas."""
    out = torch.zeros(rows_MD.shape, dtype=torch.float64)
    for m in range(rows_MD.shape[0]):
        for n in range(int(offsets[m]), int(offsets[m + 1])):
            expert, weight = experts[int(slots[n])], weights[n].double()
            x = rows_MD[m].double() * (weight if shape.weight_on_input else 1)
            h = expert.w13_2ID.double() @ x
            if expert.b13_2I is not None:
                h = h + expert.b13_2I.double()
            y = expert.w2_DI.double() @ activation_f64(shape.activation, *h.chunk(2))
            if expert.b2_D is not None:
                y = y + expert.b2_D.double()
            out[m] += y if shape.weight_on_input else weight * y
    return out


def build(name: str, shape: KernelShape, seed: int) -> tuple[ExpertKernel, list[list[ExpertWeights]]]:
    """A kernel with random experts in all slots, and these experts by layer and slot."""
    generator = torch.Generator().manual_seed(seed)
    kernel = KERNELS[name](shape)
    experts = [[random_weights(shape, generator) for _ in range(shape.num_slots)] for _ in range(shape.num_layers)]
    for layer, row in enumerate(experts):
        for slot, weights in enumerate(row):
            kernel.set_slot(layer, slot, weights)
    return kernel, experts


def check(kernel, experts, layer, rows_MD, offsets, slots, weights):
    """One call of a layer against the oracle."""
    shape = kernel.shape
    on_device = rows_MD.to(shape.device)
    out = torch.full_like(on_device, float("nan"))
    kernel.forward(layer, on_device, offsets, slots, weights, out)
    out_MD = out.cpu()
    expected = oracle(shape, experts[layer], rows_MD, offsets, slots, weights)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(out_MD.double(), expected, rtol=0, atol=TOLERANCE[shape.dtype] * scale)


def run_case(name: str, shape: KernelShape, num_rows: int, seed: int, pairs_per_row: int = 3) -> None:
    """All layers of a random kernel on random rows against the oracle."""
    kernel, experts = build(name, shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows_MD = torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.dtype)
    pairs = random_pairs(num_rows, shape.num_slots, pairs_per_row, generator)
    for layer in range(shape.num_layers):
        check(kernel, experts, layer, rows_MD, *pairs)
