"""What becomes of a model, told from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass

from experts.checkpoint.architectures.table import STATES, State, entry_of, why_refused
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.families import activation_of, family_of
from experts.checkpoint.hf_config import ModelConfig


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

    Files of weights are not asked for: an unsupported quantization is told, a missing tensor is not.
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
        stored = config.weight_format()
        activation = activation_of(family, config).kind
    except CheckpointError as error:
        return Verdict(State.refused, str(error))
    state = State.read if entry is None else entry.state
    name = config.model_type if entry is None else f"{entry.name} ({config.model_type})"
    note = f"; {entry.note}" if entry is not None and entry.note else ""
    form = "plain floats" if stored is None else f"{stored.name} in groups of {stored.group}"
    return Verdict(
        state,
        f"{name}: {STATES[state]}{note}; {layers} layers of {experts} experts, top-{top_k}, hidden size {hidden}, "
        f"expert width {width}, {activation}, {form}",
    )
