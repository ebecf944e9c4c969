"""What becomes of a model, from its config.json alone: no option, no placement, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.check_command.findings import Findings, Kind
from experts.checkpoint.architectures.table import State, why_refused
from experts.checkpoint.architectures.verdict import verdict_on
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.hf_config import ModelConfig


def model_values(path: Path) -> dict[str, Any] | None:
    """The values of a model's config.json, None if the file is none."""
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and {"model_type", "architectures"} & values.keys() else None


def check_architecture(values: dict[str, Any], path: Path, findings: Findings) -> None:
    """Add the verdict on a model. Its weights are not looked at."""
    reason = why_refused(values)
    if reason is not None:
        findings.refuse([f"{path}: {reason}"])
        return
    try:
        verdict = verdict_on(ModelConfig.of_values(values, path))
    except CheckpointError as error:
        findings.refuse([str(error)])
        return
    if not verdict.served:
        findings.refuse([f"{path}: {verdict.text}" if str(path) not in verdict.text else verdict.text])
        return
    findings.add(Kind.served, f"{path}: {verdict.text}")
    if verdict.state is State.read:
        findings.add(Kind.warning, f"{path}: compare some answers with plain vLLM's before you rely on this model")
