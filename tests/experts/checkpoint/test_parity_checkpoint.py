"""The reader returns the weights that transformers' expert modules compute with, for every family it can build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.model.reference_mlp import expert_mlp
from tests.support.family_configs import PARITY_FAMILIES
from tests.support.random_checkpoints import make_checkpoint

ROWS = 5


def run_one_expert(module: Any, family: str, expert: int, num_experts: int, rows_MD: torch.Tensor) -> torch.Tensor:
    """One expert of transformers' module, with router weight 1."""
    if family == "llama4_text":  # expects rows for every expert
        return module(rows_MD.repeat(num_experts, 1)).view(num_experts, *rows_MD.shape)[expert]
    ids = torch.full((len(rows_MD), 1), expert)
    return module(rows_MD, ids, torch.ones(len(rows_MD), 1)).reshape(rows_MD.shape)


@pytest.mark.parametrize("family", [*PARITY_FAMILIES, "minimax_m2", "glm_moe_dsa", "llama4_text", "dbrx"])
def test_experts_compute_what_transformers_computes(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(family, tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    folders = [folder]
    if family in ("qwen3_moe", "mixtral", "minimax_m2", "deepseek_v3"):
        model.save_pretrained(tmp_path / "fused", save_original_format=False)
        folders.append(tmp_path / "fused")
    for path in folders:
        checkpoint = ExpertCheckpoint.open(path)
        checkpoint.check()
        spec = checkpoint.spec
        assert spec.num_layers == len(modules)
        rows_MD = torch.randn(ROWS, spec.hidden_size, generator=torch.Generator().manual_seed(3))
        for layer, module in enumerate(modules):
            for expert in range(spec.num_experts):
                with torch.no_grad():
                    expected = run_one_expert(module, family, expert, spec.num_experts, rows_MD)
                got = expert_mlp(rows_MD, checkpoint.read_expert(layer, expert, torch.float32), spec.activation)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
