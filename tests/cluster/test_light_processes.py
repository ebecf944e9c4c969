"""What runs beside the engines imports none of torch, vllm and numba: it starts at once and stays small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READ = """
import sys
import yaml
from cluster.config.serve_file import MeshConfig
config = MeshConfig.from_file("configs/tiny-cpu.yaml")
experts, llm, console = (app["args"] for app in config.serve["applications"])
"""
PROCESSES = {
    "the command that serves": "import cluster.serving\ncluster.serving._check_plan(config)",
    "the command for a running service": "import cluster.placement_command.changes, cluster.controller.client",
    "the build task of experts": "import serve_app\nserve_app.build_experts(experts)",
    "the build task of llm": "import serve_app\nserve_app.build_llm(llm)",
    "the build task of console": "import serve_app\nserve_app.build_console(console)",
    "the console": "import cluster.console.deployment, cluster.console.endpoints",
    "the controller": "import cluster.controller.deployment",
    "a controller at work": """
import numpy as np
from tests.support.simulated.mesh import SimulatedMesh
mesh = SimulatedMesh(3)
mesh.run_until_still()
mesh.scale(5)
mesh.run_until_still()
mesh.scale(3)
mesh.run_until_still()
assert mesh.mesh.conductor.counters.copies
""",
}


@pytest.mark.parametrize("process", PROCESSES)
def test_it_imports_nothing_heavy(process: str) -> None:
    heavy = {"torch", "vllm", "transformers", "numba"}
    code = f"{READ}{PROCESSES[process]}\nprint(sorted({heavy} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
