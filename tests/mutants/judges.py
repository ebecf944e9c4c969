"""Which tests judge which module. They need no Ray cluster, no engine and no other process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Judge:
    """Patterns of test files, the quickest first.

    `compiled`: with Numba's compiler, else by its interpreter, which saves the seconds that a mutant takes to compile.
    """

    patterns: tuple[str, ...]
    compiled: bool = False
    without: str = ""  # tests with one of these words in their name, as pytest's -k has them

    def arguments(self, tree: Path) -> list[str]:
        """What pytest is told: test files by their paths from `tree`. ValueError names a pattern that matches none."""
        found: dict[str, None] = {}
        for pattern in self.patterns:
            matches = sorted(tree.glob(pattern))
            if not matches:
                raise ValueError(f"judges.py: no test file matches {pattern}")
            found |= dict.fromkeys(str(path.relative_to(tree)) for path in matches)
        return [*found, *(["-k", f"not ({self.without})"] if self.without else [])]


def _tests(*patterns: str, **more: Any) -> Judge:
    return Judge(tuple(f"tests/{pattern}" for pattern in patterns), **more)


_DISPATCH = _tests(
    "experts/dispatch/test_sums_in_float32.py",
    "experts/dispatch/test_dispatch*.py",
    compiled=True,
    without="shards_give or on_one_shard or routers",  # whose shards are processes
)
_CHECKPOINT = _tests("experts/checkpoint/test_[!p]*.py")  # but for parity, which needs transformers' models
# Without the libraries that wrote the formats, which take seconds to import.
_QUANTIZATION = _tests(
    "experts/checkpoint/quantization/test_[fv]*.py", "experts/checkpoint/quantization/test_stacked*.py"
)
_GATE = "cluster/http/test_gate*.py"

JUDGES = {
    "cluster/http/gate.py": _tests("cluster/http/test_gate_keys.py", _GATE),
    "cluster/http/errors.py": _tests("cluster/http/test_error_statuses.py", _GATE),
    "cluster/http/shape.py": _tests("cluster/http/test_shape.py", "cluster/http/test_requests.py"),
    "cluster/observability/exporter.py": _tests("cluster/observability/test_exporter.py"),
    "cluster/observability/router_series.py": _tests("cluster/observability/test_series.py"),
    "cluster/keys/keyring.py": _tests("cluster/keys/test_keyring.py", _GATE),
    "cluster/mesh/roster.py": _tests("cluster/mesh/test_roster_edges.py", "cluster/mesh/test_roster.py"),
    "cluster/mesh/holdings.py": _tests("cluster/mesh/test_holdings.py"),
    "cluster/mesh/conductor.py": _tests("cluster/mesh/test_conductor*.py"),
    "cluster/controller/deployment.py": _tests("cluster/controller/test_*.py"),
    "experts/dispatch/dispatcher.py": _DISPATCH,
    "experts/dispatch/rows/host_mover.py": _DISPATCH,
    "experts/dispatch/rows/torch_mover.py": _DISPATCH,
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
    **{
        f"experts/checkpoint/quantization/{name}.py": _QUANTIZATION
        for name in ("awq", "blocks", "floats", "from_config", "gptq", "integers", "packing", "scheme", "stacked")
    },
    "experts/kernels/offload/residency.py": _tests("experts/kernels/offload/test_[or]*.py"),
    "experts/kernels/offload/transitions.py": _tests("experts/kernels/offload/test_transitions.py"),
    "placement/capacity/eviction.py": _tests("placement/capacity/test_eviction.py"),
    "placement/capacity/residency.py": _tests("placement/capacity/test_residency.py"),
}
