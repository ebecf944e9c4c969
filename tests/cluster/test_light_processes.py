"""What runs beside the engines imports neither torch nor vllm: it starts at once and stays small."""

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
    "the command": "import cluster.cli\nfrom cluster.controller.initial_placement import check_plan\n"
    "check_plan(config.experts)",
    "the build task of experts": "import serve_app\nserve_app.build_experts(experts)",
    "the build task of llm": "import serve_app\nserve_app.build_llm(llm)",
    "the build task of console": "import serve_app\nserve_app.build_console(console)",
    "the console": "import cluster.console.deployment, cluster.console.endpoints",
    "the controller": "import cluster.controller.deployment",
}


@pytest.mark.parametrize("process", PROCESSES)
def test_it_imports_neither_torch_nor_vllm(process: str) -> None:
    code = f"{READ}{PROCESSES[process]}\nprint(sorted({{'torch', 'vllm', 'transformers'}} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
