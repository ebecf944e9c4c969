"""What a router says the next layer will need: its gate, found in a model by the names of experts."""

from __future__ import annotations

import pytest
import torch

from experts.dispatch.rows.pregate import MAX_TOKENS, PreGate
from experts.protocol.wire import HINTED_EXPERTS, hinted_experts

HIDDEN, EXPERTS, TOP_K = 8, 12, 3


class PairLinear(torch.nn.Linear):
    """Answers as vLLM's linear layers do."""

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x_TD), None


class Block(torch.nn.Module):
    """A MoE block; the experts are a module inside a module, as in vLLM."""

    def __init__(self, gate: torch.nn.Module, name: str = "gate") -> None:
        super().__init__()
        setattr(self, name, gate)
        self.experts = torch.nn.Sequential(torch.nn.Identity())


def pregate(*blocks: Block, num_experts: int = EXPERTS) -> PreGate:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
    layers = {f"layers.{number}.experts.0": number for number in range(len(blocks))}
    return PreGate.of(model, layers, num_experts, TOP_K, torch.zeros(1, HIDDEN))


@pytest.mark.parametrize("name", ["gate", "router"])
@pytest.mark.parametrize("linear", [torch.nn.Linear, PairLinear])
def test_the_next_layers_gate_chooses(name: str, linear: type[torch.nn.Linear]) -> None:
    blocks = [Block(linear(HIDDEN, EXPERTS), name) for _ in range(3)]
    x_TD = torch.randn(5, HIDDEN)
    for layer in range(2):
        gate = getattr(blocks[layer + 1], name)
        with torch.no_grad():
            logits_TE = x_TD @ gate.weight.T + gate.bias
            found = hinted_experts(pregate(*blocks).words(layer, x_TD), EXPERTS).tolist()
        assert found == sorted(set(logits_TE.topk(TOP_K).indices.flatten().tolist()))
    assert not pregate(*blocks).words(2, x_TD).any(), "the next token is not known yet"


def test_a_correction_of_the_choice_counts() -> None:
    gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
    gate.e_score_correction_bias = torch.zeros(EXPERTS)
    gate.e_score_correction_bias[[1, 5, 9]] = 2.0
    words = pregate(Block(gate), Block(gate)).words(0, torch.randn(4, HIDDEN))
    assert hinted_experts(words, EXPERTS).tolist() == [1, 5, 9]


def test_where_there_is_nothing_to_say() -> None:
    class Odd(torch.nn.Module):
        def forward(self) -> None:
            """Takes no rows."""

    gate = torch.nn.Linear(HIDDEN, EXPERTS)
    known = pregate(Block(gate), Block(gate))
    assert not known.words(0, torch.zeros(0, HIDDEN)).any()
    assert not known.words(0, torch.zeros(MAX_TOKENS + 1, HIDDEN)).any()
    assert known.words(0, torch.zeros(MAX_TOKENS, HIDDEN)).any()
    for other in (torch.nn.Linear(HIDDEN, EXPERTS + 1), Odd(), torch.nn.Linear(HIDDEN + 1, EXPERTS)):
        assert not pregate(Block(gate), Block(other)).words(0, torch.zeros(1, HIDDEN)).any()
    many = torch.nn.Linear(HIDDEN, HINTED_EXPERTS + 1)
    assert not pregate(Block(many), Block(many), num_experts=HINTED_EXPERTS + 1).words(0, torch.zeros(1, HIDDEN)).any()
