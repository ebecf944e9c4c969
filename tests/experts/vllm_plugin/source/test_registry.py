"""The walk over vLLM's registry, on a registry made for it; test_table.py runs it over the installed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.vllm_plugin.source.registry import ModelRegistry

REGISTRY = """
_TEXT_GENERATION_MODELS = {
    "PlainForCausalLM": ("plain", "PlainForCausalLM"),
    "SparseForCausalLM": ("sparse", "SparseForCausalLM"),
    "HeirForCausalLM": ("heir", "HeirForCausalLM"),
    "PackedForCausalLM": ("vllm.models.packed", "PackedForCausalLM"),
}
_MULTIMODAL_MODELS = {"SeesForCausalLM": ("sees", "SeesForCausalLM")}
_SPECULATIVE_DECODING_MODELS = {"GuessesMTP": ("guesses", "GuessesMTP")}
_TRANSFORMERS_SUPPORTED_MODELS = {
    "OneForCausalLM": ("transformers", "TransformersForCausalLM"),
    "ManyForCausalLM": ("transformers", "TransformersMoEForCausalLM"),
}
_ALL = {**_TEXT_GENERATION_MODELS}
"""
FILES = {
    "model_executor/models/registry.py": REGISTRY,
    "model_executor/models/plain.py": "from .interfaces import x\nclass PlainForCausalLM: pass\n",
    "model_executor/models/interfaces.py": "from .sparse import SparseForCausalLM\n",
    "model_executor/models/sparse.py": "experts = layers.FusedMoEFactory(num_experts=8)\n",
    "model_executor/models/heir.py": "def load():\n    from .sparse import SparseForCausalLM\n",
    "model_executor/models/sees.py": "from vllm.model_executor.models.plain import Plain\nfrom . import heir\n",
    "model_executor/models/guesses.py": "from vllm.models.packed import PackedForCausalLM\n",
    "models/packed/__init__.py": "from .inner.model import PackedForCausalLM\n",
    "models/packed/inner/model.py": "from vllm.model_executor.layers.fused_moe import FusedMoE\nx = FusedMoE()\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_models_have_experts_by_their_module_or_one_that_it_imports(folder: Path) -> None:
    found = ModelRegistry(folder).with_experts()
    assert sorted(found) == [
        *("GuessesMTP", "HeirForCausalLM", "ManyForCausalLM", "PackedForCausalLM", "SeesForCausalLM"),
        "SparseForCausalLM",
    ]
    assert [name for name, entry in found.items() if entry.draft] == ["GuessesMTP"]


def test_the_registry_that_moved_is_named(folder: Path) -> None:
    path = folder / "model_executor/models/registry.py"
    path.write_text(REGISTRY.replace("_MULTIMODAL_MODELS", "_OTHER_MODELS"))
    with pytest.raises(LookupError, match=r"this vllm has no .*registry\._MULTIMODAL_MODELS"):
        ModelRegistry(folder).with_experts()
    path.unlink()
    with pytest.raises(LookupError, match="this vllm has no"):
        ModelRegistry(folder).with_experts()
