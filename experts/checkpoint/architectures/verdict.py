"""What becomes of a model, told from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass

from experts.checkpoint.architectures.table import STATES, State, entry_of, why_refused
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.families import activation_of, family_of
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.layout import Layout
from experts.checkpoint.quantization.scheme import Scheme


@dataclass(frozen=True)
class Verdict:
    """`text` is one line; `state` tells whether, and how well tested, the model would be served."""

    state: State
    text: str

    @property
    def served(self) -> bool:
        return self.state in (State.parity, State.read)


def verdict_on(config: ModelConfig) -> Verdict:
    """The verdict on a configuration, by its architecture, or where that is in no table by its model type.

    Files of weights are not asked for: an unsupported quantization, or one that does not fit the model's sizes, is
    told, a missing tensor is not.
    """
    entry, reason = entry_of(config.values), why_refused(config.values)
    if entry is not None and reason is not None:
        return Verdict(entry.state, reason)
    try:
        family = family_of(config)
        layers = len(family.moe_layers(config))
        if not layers:
            return Verdict(State.dense, f"{config.model_type}: {STATES[State.dense]}")
        experts, top_k = config.int_of(*family.num_experts), config.int_of(*family.top_k)
        hidden, width = config.int_of(*family.hidden_size), config.int_of(*family.intermediate_size)
        scheme = config.scheme()
        activation = activation_of(family, config).kind
    except CheckpointError as error:
        return Verdict(State.refused, str(error))
    state = State.read if entry is None else entry.state
    name = config.model_type if entry is None else f"{entry.name} ({config.model_type})"
    note = f"; {entry.note}" if entry is not None and entry.note else ""
    misfit = None if scheme is None else _misfit(scheme, family.layouts, hidden, width)
    if scheme is not None and misfit is not None:
        return Verdict(State.refused, f"{name}: experts stored as {scheme.text}: {misfit}")
    form = "plain floats" if scheme is None else _form(scheme, family.keeps(scheme), hidden, width)
    return Verdict(
        state,
        f"{name}: {STATES[state]}{note}; {layers} layers of {experts} experts, top-{top_k}, hidden size {hidden}, "
        f"expert width {width}, {activation}, {form}",
    )


def _misfit(scheme: Scheme, layouts: tuple[Layout, ...], hidden: int, width: int) -> str | None:
    if scheme.in_stack() is None and all(part.stack != "none" for layout in layouts for part in layout.parts):
        return "this is supported only where each expert has tensors of its own, and this model stacks them"
    return scheme.misfit(width, hidden) or scheme.misfit(hidden, width)


def _form(scheme: Scheme, kept: bool, hidden: int, width: int) -> str:
    if kept:
        return f"{scheme.text}, which kernels for GPUs keep as it is"
    stored = 2 * scheme.matrix_bytes(width, hidden, 2) + scheme.matrix_bytes(hidden, width, 2)
    return (
        f"{scheme.text}, which no kernel keeps: an expert takes {stored / 1e6:.1f} MB in the files and, in 16 bits, "
        f"{6 * hidden * width / 1e6:.1f} MB in memory"
    )
