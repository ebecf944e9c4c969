"""What a LoRA adapter in PEFT's format changes, told from its two files: adapter_config.json and the header of
adapter_model.safetensors. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.header import open_weights, parse_header
from experts.checkpoint.hf_config import read_json_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
POSSIBLE = "attention, shared experts, dense MLPs, gates, and the head where vLLM's model class has it"
# vLLM wraps these, and then computes with their weights past the wrapper: an adapter would change nothing.
_READ_PAST = {
    "kv_b_proj": "vLLM folds it into multi-head latent attention",
    "shared_expert_gate": "vLLM computes it as a part of the shared expert",
}
_NAMED = 3  # tensors that an error names


def adapter_folders(folder: Path) -> list[Path]:
    """The adapters in a folder, by name: its folders, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def adapter_problems(folder: Path, max_rank: int | None = None) -> Iterator[str]:
    """One line for each reason why the adapter in a folder cannot be served with its routed experts on shards.

    Args:
        folder: has adapter_config.json and adapter_model.safetensors.
        max_rank: the largest rank that engines have room for; None: not known here.
    """
    try:
        config = read_json_object(folder / ADAPTER_CONFIG, "an adapter as PEFT saves it")
        with open_weights(folder / ADAPTER_WEIGHTS) as file:
            tensors = sorted(parse_header(file, folder / ADAPTER_WEIGHTS))
    except CheckpointError as error:
        yield str(error)
        return
    rank = _rank_of(config)
    if max_rank is not None and rank is not None and rank > max_rank:
        yield f"{folder / ADAPTER_CONFIG}: its rank is {rank}, more than max_lora_rank ({max_rank})"
    routed = [name for name in tensors if touches_routed_experts(name)]
    if routed:
        targets = _targets_of(config, routed)
        named = f" ({ADAPTER_CONFIG} targets {', '.join(targets)})" if targets else ""
        yield (
            f"{folder / ADAPTER_WEIGHTS} changes routed experts, which stand on shards and serve every adapter alike: "
            f"{_list(routed)}{named}; possible are {POSSIBLE}"
        )
    for part, why in _READ_PAST.items():
        passed_over = [name for name in tensors if part in name.split(".")]
        if passed_over:
            yield (
                f"{folder / ADAPTER_WEIGHTS} changes {part}, which would have no effect ({why}): {_list(passed_over)}; "
                f"possible are {POSSIBLE}"
            )


def touches_routed_experts(tensor: str) -> bool:
    """Whether a tensor of an adapter belongs to routed experts: its name has `experts`, but in a few families."""
    granite, step = (
        ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
        ("moe.gate_proj", "moe.up_proj"),
    )
    others = (*granite, *step, "moe.down_proj")
    return "experts" in tensor.split(".") or any(f".{name}." in tensor for name in others)


def _rank_of(config: dict[str, Any]) -> int | None:
    """The largest rank that any part of the adapter has."""
    pattern = config.get("rank_pattern")
    given = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in given if type(rank) is int), default=None)


def _targets_of(config: dict[str, Any], tensors: list[str]) -> list[str]:
    """The entries of target_modules and target_parameters that the tensors come from."""
    found = []
    for key in ("target_modules", "target_parameters"):
        entries = config.get(key)
        for entry in entries if isinstance(entries, list) else [entries] if isinstance(entries, str) else []:
            # A fused parameter has tensors named after its module: experts.lora_A for experts.gate_up_proj.
            module = entry.rpartition(".")[0] if key == "target_parameters" else entry
            if any(f".{module}." in f".{tensor}" for tensor in tensors):
                found.append(f"{key}: {entry}")
    return found


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
