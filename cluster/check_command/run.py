"""Check files, and tell what was found."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.check_command.applications import check_config
from cluster.check_command.architecture import check_architecture, model_values
from cluster.check_command.findings import Findings
from cluster.check_command.model import OFFLINE
from cluster.check_command.serve_configs import serve_configs
from placement.command.ending import Ending, tell


def check(paths: Sequence[Path], offline: bool, as_json: bool) -> Ending:
    """Print what was found in each file; REFUSED if one of them would be refused."""
    if offline:
        os.environ[OFFLINE] = "1"  # read by huggingface_hub when it is imported, which is later
    found = [check_file(path) for path in paths]
    document = {"accepted": not any(each.refused for each in found), "files": [each.to_dict() for each in found]}
    tell(as_json, document, _lines(found))
    return Ending.REFUSED if any(each.refused for each in found) else Ending.DONE


def check_file(path: Path) -> Findings:
    """Everything that is found in one file: configs of a service, or the config.json of a model."""
    findings = Findings(str(path))
    values = model_values(path)
    if values is not None:
        check_architecture(values, path, findings)
        return findings
    for config in serve_configs(path, findings):
        check_config(config, findings)
    return findings


def _lines(found: Sequence[Findings]) -> Iterable[str]:
    for each in found:
        yield from each.lines()
    if len(found) > 1:
        refused = sum(each.refused for each in found)
        yield f"{len(found)} files: {len(found) - refused} accepted, {refused} refused"
