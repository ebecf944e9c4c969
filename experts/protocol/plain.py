"""Messages as plain data, for channels that carry no classes of ours: vLLM's collective_rpc, JSON, command lines."""

from __future__ import annotations

import dataclasses
from typing import Any


def exact_fields(cls: type, data: Any) -> dict[str, Any]:
    """`data` as keyword arguments of the dataclass `cls`. ValueError names each key that is missing or unknown."""
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__}: expected a mapping, got {type(data).__name__}")
    expected = [field.name for field in dataclasses.fields(cls)]
    missing = [name for name in expected if name not in data]
    unknown = [key for key in data if key not in expected]
    if missing or unknown:
        raise ValueError(f"{cls.__name__}: missing keys {missing}, unknown keys {unknown}; expected {expected}")
    return dict(data)
