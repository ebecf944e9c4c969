"""Which tests judge which module. They need no Ray cluster, no engine and no other process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Judge:
    """Patterns of test files, the quickest first.

    `compiled`: with Numba's compiler. Otherwise by its interpreter, which saves the seconds that compiling a mutant takes.
    """

    patterns: tuple[str, ...]
    compiled: bool = False

    def paths(self, tree: Path) -> list[str]:
        """The test files in `tree`, by their paths from there; ValueError names a pattern that matches none."""
        found: dict[str, None] = {}
        for pattern in self.patterns:
            matches = sorted(tree.glob(pattern))
            if not matches:
                raise ValueError(f"judges.py: no test file matches {pattern}")
            found |= dict.fromkeys(str(path.relative_to(tree)) for path in matches)
        return list(found)


def _tests(*patterns: str, compiled: bool = False) -> Judge:
    return Judge(tuple(f"tests/{pattern}" for pattern in patterns), compiled)


_CHECKPOINT = _tests(
    "experts/checkpoint/test_dequantize.py",
    "experts/checkpoint/test_families.py",
    "experts/checkpoint/test_quantized_experts.py",
    "experts/checkpoint/test_reading.py",
)
_RULE = _tests("placement/rule/test_*.py")

JUDGES = {
    "cluster/http/gate.py": _tests("cluster/http/test_gate_keys.py", "cluster/http/test_http_side.py"),
    "cluster/http/errors.py": _tests("cluster/http/test_error_statuses.py", "cluster/http/test_http_side.py"),
    "cluster/controller/roster.py": _tests("cluster/controller/test_roster*.py"),
    "experts/protocol/wire.py": _tests("experts/protocol/test_wire*.py"),
    "experts/shard/request.py": _tests("experts/shard/test_request*.py"),
    "experts/shard/slots.py": _tests("experts/shard/test_slots.py"),
    "placement/rule/evaluate.py": _RULE,
    "placement/rule/local_replicas.py": _RULE,
    "placement/rule/replica_choice.py": _RULE,
    "experts/checkpoint/dequantize.py": _CHECKPOINT,
    "experts/checkpoint/families.py": _CHECKPOINT,
    "experts/checkpoint/hf_config.py": _CHECKPOINT,
    "experts/checkpoint/layout.py": _CHECKPOINT,
    "experts/checkpoint/reader.py": _CHECKPOINT,
    "experts/checkpoint/safetensors_file.py": _CHECKPOINT,
    "experts/checkpoint/storage.py": _CHECKPOINT,
    "experts/checkpoint/weight_format.py": _CHECKPOINT,
}
