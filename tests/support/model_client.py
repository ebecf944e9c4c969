"""A process that fetches a model, as shards, routers and the planner do: `ModelClient` starts it, its main is it.

huggingface_hub and s3fs read their environment once a process, so each test needs processes of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fetched:
    """What a client had at its end. `error` is None, or its message; `sha256` has the files of the folder."""

    pinned: str = ""
    error: str | None = None
    sha256: dict[str, str] | None = None
    torch: bool = False

    @property
    def files(self) -> set[str]:
        """Names of the files in the folder."""
        return set(self.sha256 or {})


def start_client(roles: str, model: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a client that plays roles, separated by spaces, one after another.

    Roles: plan, config, rest, or `experts:0.3,1.17` for expert 3 of layer 0 and 17 of layer 1.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "AWS_", "EXPERTMESH_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.model_client", model, *roles.split()],
        cwd=ROOT, env={**inherited, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results_of(client: subprocess.Popen[str]) -> list[Fetched]:
    """Wait for a client; what it had after each role. AssertionError with its log if it died."""
    try:
        out, log = client.communicate(timeout=300)
    finally:
        client.kill()
    assert client.returncode == 0, log
    return [Fetched(**values) for values in json.loads(out.splitlines()[-1])]


def fetch(role: str, model: str, environment: dict[str, str]) -> Fetched:
    """Run a client that plays one role."""
    return results_of(start_client(role, model, environment))[0]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def play(role: str, model: str) -> dict[str, Any]:
    """Play a role in this process: the values of a `Fetched`."""
    from experts.checkpoint import CheckpointError
    from experts.checkpoint.sources.opening import open_source

    pinned = ""
    try:
        source = open_source(model).resolved()
        pinned = str(source)
        if role == "config":
            folder = source.fetch(["config.json"])
        elif role == "plan":
            from experts.checkpoint import ExpertCheckpoint

            checkpoint = ExpertCheckpoint.open(pinned)
            checkpoint.check()
            folder = source.fetch(source.facts())
        elif role == "rest":
            from experts.checkpoint.reader import fetch_rest

            folder = fetch_rest(pinned)
        else:
            from experts.checkpoint import ExpertCheckpoint

            checkpoint = ExpertCheckpoint.open(pinned)
            pairs = [pair.split(".") for pair in role.removeprefix("experts:").split(",")]
            checkpoint.fetch_experts((int(layer), int(expert)) for layer, expert in pairs)
            folder = source.fetch(source.facts())
    except CheckpointError as error:
        return {"error": str(error), "pinned": pinned, "torch": "torch" in sys.modules}
    return {"pinned": pinned, "sha256": digests(folder), "torch": "torch" in sys.modules}


if __name__ == "__main__":
    print(json.dumps([play(role, sys.argv[1]) for role in sys.argv[2:]]))
