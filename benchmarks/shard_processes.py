"""Shards as plain processes, for benchmarks that need no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from experts.checkpoint import ExpertCheckpoint
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.settings import ShardSettings
from placement.placement import Placement


class ShardProcesses:
    """A process for each shard; ready when constructed, ended on exit. A context manager.

    Raises RuntimeError if a shard ends before it is ready.
    """

    def __init__(
        self,
        model: Path,
        dtype: str,
        placement: Placement | None = None,
        num_ranks: int = 2,
        cores: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        spec = ExpertCheckpoint.open(model).spec
        self.placement = placement or Placement.linear(spec.num_layers, spec.num_experts, num_ranks)
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            self._placement_file = file.name
        self.placement.save(self._placement_file)
        shard = ShardSettings(model_path=str(model), dtype=dtype, **settings)  # type: ignore[arg-type]
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(self.placement.num_ranks):
            command = [sys.executable, "-m", "experts.shard.server", "--settings", shard.model_dump_json()]
            command += ["--placement", self._placement_file, "--rank", str(rank), "--until-stdin-closes"]
            core = None if cores is None else cores[rank % len(cores)]
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL if shard.device == "cpu" else None,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    preexec_fn=None if core is None else (lambda core=core: os.sched_setaffinity(0, {core})),
                )
            )
        endpoints = []
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"shard {rank} ended before it was ready, exit code {process.wait(10)}")
            endpoints.append(ShardEndpoint(**json.loads(line)))
        self.membership = Membership(1, self.placement, tuple(endpoints))

    def __enter__(self) -> ShardProcesses:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.unlink(self._placement_file)
