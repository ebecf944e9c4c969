"""Exact bytes of a checkpoint's parts, from the headers of its safetensors files: here, or on the hub by ranges."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.families import family_of
from experts.checkpoint.header import DTYPES, read_header
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.index import WeightIndex
from placement.sizing.model import Side

_LAYER = re.compile(r"\b(?:layers|blocks)\.(\d+)\.")
_FURTHER = re.compile(r"^(?:model\.)?mtp\.")  # predicts further tokens, and is numbered from 0 anew
_COPIES = re.compile(r"\bembed_tokens\b|\bshared_head\.head\b")  # in such a layer, which takes the model's own
MTP, MTP_EXPERTS, MTP_COPIES = "multi-token prediction", "its routed experts", "its copies of embedding and head"
# The first that fits says what a tensor is.
_PARTS: tuple[tuple[str, str], ...] = (
    ("vision", r"^(?:model\.)?(?:vision|visual|mm_projector|multi_modal)"),
    ("embedding", r"embed_tokens|\bwte\b"),
    ("output head", r"\blm_head\b"),
    ("shared experts", r"shared_expert"),
    ("gate", r"\b(?:mlp|feed_forward|block_sparse_moe)\.(?:gate|router)\.|\bffn\.router\b|e_score_correction_bias"),
    ("norms", r"(?:input|post_attention)_layernorm|\bnorm(?:_f|_1|_2)?\.weight$|norm_attn_norm\.norm_"),
    ("attention", r"attn|attention"),
    ("dense MLP", r"mlp|feed_forward"),
)


def parts_of_folder(folder: Path, config: ModelConfig) -> tuple[tuple[str, Side, int], ...]:
    """(part, side, bytes) of the tensors in the files of a folder that its index names.

    CheckpointError names a file that is missing or no safetensors file, or a tensor that the index has in another one.
    """
    by_file = WeightIndex.of_folder(folder).by_file()
    sizes: list[tuple[str, int]] = []
    for path, names in by_file.items():
        header = read_header(path)
        for name in names:
            if name not in header:
                raise CheckpointError(f"{path}: has no tensor {name}, which the index says it holds")
            sizes.append((name, header[name].nbytes))
    return sort_parts(sizes, config)


def parts_on_hub(repo: str, revision: str | None, config: ModelConfig) -> tuple[tuple[str, Side, int], ...]:
    """The same of a model on the hub, whose headers are fetched by ranges: kilobytes a file, no weights.

    CheckpointError if the hub does not give them.
    """
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(repo, revision=revision)
        sizes = [
            (name, math.prod(tensor.shape) * DTYPES[tensor.dtype][1])
            for file in metadata.files_metadata.values()
            for name, tensor in file.tensors.items()
        ]
    except Exception as error:  # transport errors are of whichever HTTP library huggingface_hub uses
        raise CheckpointError(f"{repo}: its headers cannot be had: {' '.join(str(error).split())}") from error
    return sort_parts(sizes, config)


def sort_parts(sizes: Iterable[tuple[str, int]], config: ModelConfig) -> tuple[tuple[str, Side, int], ...]:
    """(part, side, bytes) from (tensor's name, bytes). Layers past the last predict further tokens: unused."""
    layers = config.int_of("num_hidden_layers", "n_layers")
    experts = _experts(config)
    total: Counter[tuple[str, Side]] = Counter()
    for name, nbytes in sizes:
        layer = _LAYER.search(name)
        side: Side = "router"
        past = layer is not None and int(layer[1]) >= layers and not name.startswith(("vision", "visual"))
        if past or _FURTHER.search(name):
            side = "unused"
            part = MTP_EXPERTS if experts.search(name) else MTP_COPIES if _COPIES.search(name) else MTP
        elif experts.search(name):
            part, side = "routed experts", "experts"
        else:
            part = next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")
        total[part, side] += nbytes
    if not any(side == "experts" for _, side in total):
        raise CheckpointError(f"{config.path}: no tensor of a routed expert among those of this {config.model_type}")
    return tuple((part, side, nbytes) for (part, side), nbytes in total.items())


def _experts(config: ModelConfig) -> re.Pattern[str]:
    """What names of routed experts' tensors contain, scales included."""
    try:
        layouts = family_of(config).layouts
    except CheckpointError:  # sized only; named as the others
        return re.compile(r"\bmlp\.experts\.\d+\.")
    # Some formats have their own names in place of `weight`.
    stems = {part.name.partition("{layer}")[2].removesuffix("weight") for layout in layouts for part in layout.parts}
    return re.compile("|".join(re.escape(stem).replace(r"\{expert\}", r"\d+") for stem in sorted(stems)))
