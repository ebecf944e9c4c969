"""From a quantization_config of config.json to the format of the experts, or to an error that says what is expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import GGUF, METHODS, CheckpointError
from experts.checkpoint.quantization.awq import BITS, Awq
from experts.checkpoint.quantization.blocks import FP8_BLOCK, Fp8Block, Mxfp4
from experts.checkpoint.quantization.floats import NVFP4_GROUP, Fp8Channel, Fp8Tensor, Nvfp4
from experts.checkpoint.quantization.gptq import Gptq
from experts.checkpoint.quantization.integers import Int8, PackedIntegers
from experts.checkpoint.quantization.scheme import Scheme
from experts.checkpoint.quantization.stacked import StackedFp8, StackedNvfp4
from experts.checkpoint.weight_format import MXFP4_BLOCK

_BLOCK = [FP8_BLOCK, FP8_BLOCK]
_INTEGER_GROUPS = (16, 32, 64, 128, 256)
_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


class _MisfitError(Exception):
    """What is wrong with the settings of a method that is known."""


def scheme_of(settings: Any, path: Path) -> Scheme:
    """The format that `settings` describe. CheckpointError, which names `path`, says which value is not supported."""
    values = settings if isinstance(settings, dict) else {}
    method = values.get("quant_method") if values else settings
    if str(method).lower() == "gguf":
        raise CheckpointError(f"{path}: {GGUF}")
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise CheckpointError(f"{path}: quantization {method} is not supported; expected {METHODS}")
    try:
        return reader(values)
    except _MisfitError as error:
        raise CheckpointError(f"{path}: quantization {method} {error}") from None


def spares_attention(settings: Any) -> bool:
    """Whether the settings leave the dense layers as they are, as far as anybody can tell without the files.

    MXFP4 and integers in words of compressed-tensors are used for experts alone by the models that are published so;
    others name the attention among what they exclude.
    """
    if not isinstance(settings, dict):
        return settings == "mxfp4"
    if settings.get("quant_method") == "mxfp4" or settings.get("format") == "pack-quantized":
        return True
    of_tool = settings.get("quantization")
    nested = of_tool if isinstance(of_tool, dict) else {}
    lists = [settings.get(key) for key in ("ignore", "ignored_layers", "modules_to_not_convert")]
    lists += [nested.get("exclude_modules"), settings.get("exclude_modules")]
    return any("attn" in str(name) or "attention" in str(name) for each in lists for name in each or ())


def _expect(key: str, found: Any, *allowed: Any) -> None:
    if not any(found == value and type(found) is type(value) for value in allowed):
        expected = " or ".join(map(repr, allowed))
        raise _MisfitError(f"with {key} {found!r} is not supported; expected {expected}")


def _group(key: str, found: Any) -> int | None:
    """Values that share a scale; -1 is all of a row."""
    _expect(key, found, -1, *_INTEGER_GROUPS)
    return None if found == -1 else int(found)


def _awq(settings: dict[str, Any]) -> Scheme:
    _expect("version", str(settings.get("version", "gemm")).lower(), "gemm")
    _expect("bits", settings.get("bits", settings.get("w_bit")), BITS)
    _expect("zero_point", settings.get("zero_point"), True)
    return Awq(_group("group_size", settings.get("group_size", settings.get("q_group_size"))))


def _gptq(settings: dict[str, Any]) -> Scheme:
    form = settings.get("checkpoint_format") or "gptq"
    _expect("checkpoint_format", form, *_GPTQ_VERSIONS)
    _expect("is_marlin_format", settings.get("is_marlin_format") or False, False)
    bits = settings.get("bits")
    _expect("bits", bits, 4, 8)
    # vLLM's engine takes no other for the dense layers.
    _expect("sym", settings.get("sym"), True)
    ordered = settings.get("desc_act")
    _expect("desc_act", ordered, True, False)
    dynamic = settings.get("dynamic") or {}
    other = [rule for rule in dynamic if not str(rule).startswith("-:")]
    if other:
        raise _MisfitError(
            f"with dynamic {other[0]!r} is not supported; expected one precision, and rules that begin with -:"
        )
    group = _group("group_size", settings.get("group_size"))
    # One group has no order to change.
    return Gptq(int(bits), group, ordered=bool(ordered) and group is not None, version=_GPTQ_VERSIONS[form])  # type: ignore[arg-type]


def _fp8(settings: dict[str, Any]) -> Scheme:
    block = settings.get("weight_block_size")
    if block is None:
        return Fp8Tensor()
    _expect("weight_block_size", block, _BLOCK)
    return Fp8Block()


def _modelopt(settings: dict[str, Any]) -> Scheme:
    """In config.json itself, or as hf_quant_config.json has it, in a dictionary of its own."""
    nested = settings.get("quantization")
    found = nested if isinstance(nested, dict) else settings
    algorithm = str(found.get("quant_algo")).upper()
    _expect("quant_algo", algorithm, "FP8", "NVFP4", "W4A16_NVFP4")
    if algorithm == "FP8":
        return Fp8Tensor(StackedFp8())
    group = found.get("group_size")
    if group is None:
        groups = found.get("config_groups")
        known = list(groups.values()) if isinstance(groups, dict) else []
        weights = known[0].get("weights") if known and isinstance(known[0], dict) else None
        group = weights.get("group_size") if isinstance(weights, dict) else NVFP4_GROUP
    _expect("group_size", group, NVFP4_GROUP)
    return Nvfp4(divides=False, stacked=StackedNvfp4())


def _compressed(settings: dict[str, Any]) -> Scheme:
    groups = settings.get("config_groups")
    known = groups if isinstance(groups, dict) else {}
    different = [each for n, each in enumerate(known.values()) if each not in list(known.values())[:n]]
    schemes = [each for each in different if isinstance(each, dict) and isinstance(each.get("weights"), dict)]
    weights: dict[str, Any] = schemes[0]["weights"] if schemes else {}
    if not weights or len(schemes) < len(different) or any(each["weights"] != weights for each in schemes):
        told = ", ".join(f"{name}: {_told(each)}" for name, each in known.items()) or "none"
        raise _MisfitError(
            f"is not supported with several precisions or none; expected one group of weights; "
            f"found {len(known)} groups of settings ({told})"
        )
    for key in ("sparsity_config", "transform_config"):
        extra = settings.get(key)
        plain = not extra or (key == "sparsity_config" and extra.get("format") in (None, "dense"))
        if not plain and extra != {"config_groups": {}}:
            raise _MisfitError(f"with {key} is not supported; found {extra}")
    form = schemes[0].get("format") or settings.get("format")
    kind, bits = weights.get("type"), weights.get("num_bits")
    made = _COMPRESSED.get((str(form), str(kind), bits if type(bits) is int else 0))
    if made is None:
        expected = ", ".join(f"{form} of {kind}{bits}" for form, kind, bits in _COMPRESSED)
        raise _MisfitError(
            f"is not supported as 'format': {form!r} of 'type': {kind!r}, 'num_bits': {bits!r}; expected {expected}"
        )
    return made(weights)


def _told(scheme: Any) -> str:
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict):
        return "no weights"
    return f"{weights.get('type')}{weights.get('num_bits')} by {weights.get('strategy')}"


def _symmetric(weights: dict[str, Any]) -> None:
    _expect("symmetric", weights.get("symmetric", True), True)


def _packed_integers(weights: dict[str, Any]) -> Scheme:
    strategy, order, symmetric = weights.get("strategy"), weights.get("actorder"), weights.get("symmetric", True)
    _expect("strategy", strategy, "group", "channel")
    _expect("symmetric", symmetric, True, False)
    # Sorted columns keep their own groups only by "group"; true is what older files say of it.
    _expect("actorder", order, None, False, "static", "weight", "group", True)
    group = None
    if strategy == "group":
        group = weights.get("group_size")
        _expect("group_size", group, *_INTEGER_GROUPS)
    ordered = order in ("group", True) and group is not None
    return PackedIntegers(int(weights["num_bits"]), group, symmetric=bool(symmetric), ordered=ordered)


def _int8(weights: dict[str, Any]) -> Scheme:
    _expect("strategy", weights.get("strategy"), "channel", "tensor")
    _symmetric(weights)
    return Int8(per_row=weights["strategy"] == "channel")


def _float8(weights: dict[str, Any]) -> Scheme:
    strategy = weights.get("strategy")
    _expect("strategy", strategy, "tensor", "channel", "block")
    _symmetric(weights)
    if strategy == "block":
        _expect("block_structure", weights.get("block_structure"), _BLOCK, f"{FP8_BLOCK}x{FP8_BLOCK}")
        return Fp8Block("_scale")
    return Fp8Tensor() if strategy == "tensor" else Fp8Channel()


def _packed_nvfp4(weights: dict[str, Any]) -> Scheme:
    _expect("strategy", weights.get("strategy"), "tensor_group")
    _expect("group_size", weights.get("group_size"), NVFP4_GROUP)
    _symmetric(weights)
    return Nvfp4(divides=True)


def _packed_mxfp4(weights: dict[str, Any]) -> Scheme:
    _expect("strategy", weights.get("strategy"), "group")
    _expect("group_size", weights.get("group_size"), MXFP4_BLOCK)
    _symmetric(weights)
    return Mxfp4(packed=True)


_READERS: dict[str, Callable[[dict[str, Any]], Scheme]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "mxfp4": lambda settings: Mxfp4(),
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
_COMPRESSED: dict[tuple[str, str, int], Callable[[dict[str, Any]], Scheme]] = {
    ("pack-quantized", "int", 4): _packed_integers,
    ("pack-quantized", "int", 8): _packed_integers,
    ("int-quantized", "int", 8): _int8,
    ("naive-quantized", "int", 8): _int8,
    ("float-quantized", "float", 8): _float8,
    ("naive-quantized", "float", 8): _float8,
    ("nvfp4-pack-quantized", "float", 4): _packed_nvfp4,
    ("mxfp4-pack-quantized", "float", 4): _packed_mxfp4,
}
