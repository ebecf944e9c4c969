"""Which tests judge which module. They need no Ray cluster, no engine and no other process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Judge:
    """Patterns of test files, the quickest first.

    `compiled`: with Numba's compiler, else by its interpreter, which saves the seconds that a mutant takes to compile.
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


_CHECKPOINT = _tests("experts/checkpoint/test_[!p]*.py")  # but for parity, which needs transformers' models
_GATE = "cluster/http/test_gate*.py"

JUDGES = {
    "cluster/http/gate.py": _tests("cluster/http/test_gate_keys.py", _GATE),
    "cluster/http/errors.py": _tests("cluster/http/test_error_statuses.py", _GATE),
    "cluster/observability/metrics.py": _tests("cluster/observability/test_metrics*.py"),
    "cluster/controller/roster.py": _tests("cluster/controller/test_roster_edges.py", "cluster/controller/test_r*.py"),
    "cluster/controller/deployment.py": _tests("cluster/controller/test_[!i]*.py"),  # but for the initial placement
    "experts/protocol/wire.py": _tests("experts/protocol/test_wire*.py"),
    "experts/shard/request.py": _tests("experts/shard/test_request*.py"),
    "experts/shard/slots.py": _tests("experts/shard/test_slots.py"),
    "placement/rule/evaluate.py": _tests("placement/rule/test_evaluate_figures.py", "placement/rule/test_*.py"),
    "placement/rule/local_replicas.py": _tests("placement/rule/test_local_replicas.py"),
    "placement/rule/replica_choice.py": _tests("placement/rule/test_replica*.py"),
    "experts/checkpoint/dequantize.py": _CHECKPOINT,
    "experts/checkpoint/families.py": _CHECKPOINT,
    "experts/checkpoint/hf_config.py": _CHECKPOINT,
    "experts/checkpoint/layout.py": _CHECKPOINT,
    "experts/checkpoint/reader.py": _CHECKPOINT,
    "experts/checkpoint/safetensors_file.py": _CHECKPOINT,
    "experts/checkpoint/storage.py": _CHECKPOINT,
    "experts/checkpoint/weight_format.py": _CHECKPOINT,
}
