"""Planning in a process of its own: what it tells, and how it fails, with real processes."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.config.live_sections import PlacementSection
from cluster.config.parse import ConfigError
from cluster.mesh import planning
from cluster.mesh.planning import Plan, ShardsAtHand, plan_in_a_process, plan_placement
from placement.placement import Placement
from placement.traces.trace import ActivationTrace
from tests.support.planning import MODEL, section, shards, trace_file
from tests.support.waiting import run_async


def planned(keys: PlacementSection, at_hand: ShardsAtHand) -> Plan:
    return run_async(plan_in_a_process(keys, MODEL, at_hand), timeout_s=200)


def test_a_process_plans_what_this_one_would_and_tells_the_load(tmp_path: Path) -> None:
    path = trace_file(tmp_path)
    keys = section(policy="greedy", trace=path)
    plan = planned(keys, shards(4, 9))
    assert plan.placement == plan_placement(keys, MODEL, shards(4, 9))
    assert plan.load_LE is not None
    np.testing.assert_array_equal(plan.load_LE, ActivationTrace.load_npz(path).load())


def test_a_process_reads_a_file_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    saved = Placement.linear(4, 32, 3)
    saved.save(tmp_path / "p.json")
    keys = section(file=str(tmp_path / "p.json"))
    plan = planned(keys, shards(3))
    assert (plan.placement, plan.load_LE) == (saved, None)
    with pytest.raises(ConfigError, match=r"^placement\.file: .*: it is for 3 ranks, there are 4 shards$"):
        planned(keys, shards(4))


@pytest.mark.parametrize("of_file", [False, True], ids=["linear", "file"])
def test_a_trace_tells_the_load_where_no_policy_plans_for_it(tmp_path: Path, of_file: bool) -> None:
    saved, path = Placement.linear(4, 32, 3), trace_file(tmp_path)
    saved.save(tmp_path / "p.json")
    plan = planned(section(trace=path, **{"file": str(tmp_path / "p.json")} if of_file else {}), shards(3))
    assert plan.placement == saved
    assert plan.load_LE is not None
    np.testing.assert_array_equal(plan.load_LE, ActivationTrace.load_npz(path).load())
    other = trace_file(tmp_path, num_experts=16)
    with pytest.raises(ConfigError, match=r"^placement\.trace: .*: it is for 4 layers of 16 experts, the model"):
        plan_placement(section(trace=other), MODEL, shards(3))


def test_linear_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "create_subprocess_exec", None)
    assert planned(section(), shards(3)).placement == Placement.linear(4, 32, 3)


def fake_planner(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process run `code` instead of a plan."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(planning.sys, "executable", str(script))


def test_a_plan_that_takes_too_long_is_given_up_and_its_process_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
    fake_planner(tmp_path, code, monkeypatch)
    monkeypatch.setattr(planning, "PLANNING_GRACE_S", 3.0)
    keys = section(policy="optimized", trace=trace_file(tmp_path), max_seconds=0.5)
    with pytest.raises(ConfigError, match=r"^placement: no plan within 3\.5 s$"):
        planned(keys, shards(4))
    assert not Path(f"/proc/{pid_file.read_text()}").exists(), "killed and reaped"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise MemoryError('no room')", "placement: planning failed: MemoryError: no room"),
        ("import os; os.kill(os.getpid(), 9)", "placement: planning failed: exit status -9"),
        ("import sys; sys.exit(3)", "placement: planning failed: exit status 3"),
    ],
)
def test_a_planner_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str) -> None:
    fake_planner(tmp_path, code, monkeypatch)
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        planned(section(policy="greedy", trace=trace_file(tmp_path)), shards(4))
