"""What the controller imports to plan is numpy and no more: its process stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]
MODULES = "placement.migration.plan placement.migration.price placement.search.few_copies.resize "
MODULES += "placement.search.few_copies.relabel"


def test_planning_for_a_live_service_imports_neither_numba_nor_scipy() -> None:
    imports = "\n".join(f"import {module}" for module in MODULES.split())
    code = f"import sys\n{imports}\nprint(sorted({{'numba', 'scipy', 'torch', 'ray'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
