"""The shipped table against what is published: parameters, checkpoints' sizes, active parameters, KV bytes."""

from __future__ import annotations

import pytest

from experts.checkpoint.sizes.known_models import known_model, known_models
from placement.sizing.model import ModelFacts


def facts(name: str) -> ModelFacts:
    known = known_model(name)
    assert known is not None
    return known.facts()


# What guides of this field print, in GB, where it is right: docs/sizing.md says which figures are not.
@pytest.mark.parametrize(
    ("name", "bits", "gb"),
    [
        ("mixtral-8x7b", 16, 94),
        ("mixtral-8x7b", 8, 47),
        ("mixtral-8x22b", 16, 282),
        ("mixtral-8x22b", 8, 141),
        ("deepseek-v3", 8, 671),
        ("deepseek-moe-16b", 16, 33),
        ("qwen1.5-moe-a2.7b", 16, 29),
        ("dbrx", 16, 264),
        ("dbrx", 8, 132),
        ("glm-5", 16, 1500),
        ("glm-5", 8, 744),
        ("kimi-k2.5", 16, 2000),
    ],
)
def test_figures_of_guides_come_out_within_three_percent(name: str, bits: int, gb: float) -> None:
    assert facts(name).parameters() * bits / 8 / 1e9 == pytest.approx(gb, rel=0.03)


# Sizes of the published safetensors files, without layers for multi-token prediction.
@pytest.mark.parametrize(("name", "gb"), [("gpt-oss-120b", 65.2), ("gpt-oss-20b", 13.8), ("kimi-k2.5", 594)])
def test_quantized_checkpoints_have_their_published_sizes(name: str, gb: float) -> None:
    found = facts(name)
    assert (found.weight_bytes("router") + found.weight_bytes("experts")) / 1e9 == pytest.approx(gb, rel=0.01)


# Billions, as announced.
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("deepseek-v3", 671, 37),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-235b-a22b", 235, 22),
        ("olmoe-1b-7b", 6.9, 1.3),
        ("gpt-oss-120b", 117, 5.1),
        ("gpt-oss-20b", 21, 3.6),
        ("glm-4.5", 355, 32),
        ("glm-4.5-air", 106, 12),
        ("glm-5", 744, 40),
        ("kimi-k2", 1026, 32),
    ],
)
def test_parameters_are_those_announced(name: str, total: float, active: float) -> None:
    assert facts(name).parameters() / 1e9 == pytest.approx(total, rel=0.01)
    assert facts(name).active_parameters / 1e9 == pytest.approx(active, rel=0.1)  # some count the embedding


def test_every_entry_says_where_it_is_from_and_is_found_by_both_names() -> None:
    for name, known in known_models().items():
        assert name == name.lower()
        assert known.source == f"https://huggingface.co/{known.hub}/blob/main/config.json"
        assert known_model(known.hub.upper()) is known
        assert known.facts().basis == "config"
