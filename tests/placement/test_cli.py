"""The commands, as a person types them; the server that `profile` drives is a made-up one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from placement.command.app import app
from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace


def main(words) -> int:
    return app(words, standalone_mode=False)


@pytest.fixture
def files(tmp_path):
    clique_trace(num_tokens=120).save(tmp_path / "trace.npz")
    return tmp_path


def optimize(folder, *more):
    return main(["optimize", "--trace", str(folder / "trace.npz"), "--ranks", "4", "--seconds", "2",
                 "--out", str(folder / "plan.json"), *more])  # fmt: skip


def test_optimize_writes_what_it_promises(files, capsys) -> None:
    assert optimize(files, "--slots-per-rank", "4", "--load-cap", "1.3") == 0
    data = json.loads((files / "plan.json").read_text())
    assert {"num_ranks", "num_nodes", "physical_to_logical_map", "planned"} <= set(data)
    placement = Placement.load(files / "plan.json")
    found = evaluate(placement, ActivationTrace.load_npz(files / "trace.npz"))
    np.testing.assert_allclose(data["planned"]["fan_out"], found.fan_out, atol=1e-6)
    assert "fan-out" in capsys.readouterr().out


def test_planned_and_evaluated_for_near_replicas_first(files, capsys) -> None:
    assert optimize(files, "--slots-per-rank", "5", "--nodes", "2", "--prefer-local-replicas") == 0
    assert "far fan-out" in capsys.readouterr().out
    planned = json.loads((files / "plan.json").read_text())["planned"]["far_fan_out"]
    assert main(["evaluate", "--trace", str(files / "trace.npz"), "--placement", str(files / "plan.json"),
                 "--prefer-local-replicas", "--json"]) == 0  # fmt: skip
    row = json.loads(capsys.readouterr().out)[str(files / "plan.json")]
    assert [layer["far_fan_out"] for layer in row["layers"]] == pytest.approx(planned, abs=1e-6)
    assert optimize(files, "--slots-per-rank", "5", "--prefer-local-replicas") == 1
    assert "prefer_local_replicas is set on 1 node, expected at least 2 nodes" in capsys.readouterr().err


def test_a_trace_of_counts_is_evaluated_in_json_that_others_can_read(files, capsys) -> None:
    counts = np.array([[3, 1, 0, 0], [0, 0, 0, 4]])
    ActivationTrace(np.zeros((0, 2, 1), int), 4, counts=counts).save(files / "counts.npz")
    Placement.linear(2, 4, 2).save(files / "linear.json")
    assert main(["evaluate", "--trace", str(files / "counts.npz"), "--placement", str(files / "linear.json"),
                 "--json"]) == 0  # fmt: skip
    row = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[str(files / "linear.json")]
    assert row["fan_out"] is None
    assert row["balancedness"] == 0.5


def test_a_layer_that_a_domain_never_reached_is_in_balance(files, capsys) -> None:
    ids = np.array([[[0, 1], [2, 3]], [[1, 2], [-1, -1]]])
    trace = ActivationTrace(ids, 4, domain=np.array([0, 1]), domains=("a", "b"))
    trace.save(files / "trace.npz")
    assert optimize(files, "--ranks", "2", "--domain", "b", "--effort", "0.01") == 0
    assert json.loads((files / "plan.json").read_text())["planned"]["balancedness"][1] == 1
    assert evaluate(Placement.load(files / "plan.json"), trace.of_domain("b")).balancedness[1] == 1


@pytest.mark.parametrize(
    ("engine", "more", "message"),
    [
        ("vllm", ["--layers", "1,2"], "--layers is for SGLang and TensorRT-LLM"),
        ("vllm-ascend", ["--layers", "1,2"], "--layers is for SGLang and TensorRT-LLM"),
        ("tensorrt-llm", ["--num-hidden-layers", "4"], "--num-hidden-layers is for SGLang"),
        ("tensorrt-llm", [], "out.json: tensorrt-llm reads files named .yaml or .yml"),
        ("sglang", ["--out", "map.txt"], "map.txt: sglang reads files named .json"),
    ],
)
def test_exports_that_an_engine_would_not_read_are_refused(files, capsys, engine, more, message) -> None:
    Placement.linear(2, 16, 4).save(files / "linear.json")
    arguments = ["--placement", str(files / "linear.json"), "--format", engine, "--out", str(files / "out.json")]
    assert main(["export", *arguments, *more]) == 1
    assert message in capsys.readouterr().err


def test_evaluate_prints_a_table_and_json(files, capsys) -> None:
    Placement.linear(2, 16, 4).save(files / "linear.json")
    arguments = ["evaluate", "--trace", str(files / "trace.npz"), "--placement", str(files / "linear.json")]
    assert main(arguments) == 0
    assert "node_fan_out" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[str(files / "linear.json")]
    assert row["tokens"] == 120
    assert len(row["layers"]) == 2


def test_evaluate_scores_all_placements_on_the_same_machines(files, capsys) -> None:
    trace = ActivationTrace.load_npz(files / "trace.npz")
    linear = Placement.linear(2, 16, 4)
    linear.save(files / "linear.json")
    replace(linear, speeds=(1, 1, 1, 9)).save(files / "other.json")
    names = [str(files / "linear.json"), str(files / "other.json")]
    given = ["evaluate", "--trace", str(files / "trace.npz"), "--json", "--speeds", "1,1,0.5,1"]
    given += [word for name in names for word in ("--placement", name)]
    assert main(given) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = evaluate(replace(linear, speeds=(1, 1, 0.5, 1)), trace).summary()
    assert rows[names[0]] == rows[names[1]]
    assert rows[names[0]]["balancedness"] == pytest.approx(expected["balancedness"])
    assert rows[names[0]]["balancedness"] < evaluate(linear, trace).balancedness.mean()
    assert main([*given, "--slots-per-rank", "4,4,3,4"]) == 1
    message = "linear.json: layer 0: rank 2 holds 4 experts, but has 3 slots (2 such places in all)"
    assert message in capsys.readouterr().err
    assert main([*given, "--slots-per-rank", "4,4"]) == 1
    assert "expected one for each of 4 ranks" in capsys.readouterr().err


def test_from_a_current_placement_with_bounded_moves(files) -> None:
    linear = Placement.linear(2, 16, 4)
    linear.save(files / "linear.json")
    assert optimize(files, "--current", str(files / "linear.json"), "--max-moves", "2", "--load-cap", "1.5") == 0
    placement = Placement.load(files / "plan.json")
    assert (((placement.slots_LER >= 0) & (linear.slots_LER < 0)).sum((1, 2)) <= 2).all()


def test_export(files) -> None:
    Placement.linear(2, 16, 4).save(files / "linear.json")
    for name in ("vllm", "sglang"):
        arguments = ["--placement", str(files / "linear.json"), "--format", name, "--out", str(files / "out.json")]
        assert main(["export", *arguments]) == 0
        assert "physical_to_logical_map" in json.loads((files / "out.json").read_text())
    given = ["export", "--placement", str(files / "linear.json"), "--format"]
    assert main([*given, "vllm-ascend", "--out", str(files / "out.json")]) == 0
    assert json.loads((files / "out.json").read_text())["moe_layer_count"] == 2
    assert main([*given, "tensorrt-llm", "--layers", "3,4", "--out", str(files / "out.yaml")]) == 0
    assert set(yaml.safe_load((files / "out.yaml").read_text())["initial_global_assignments"]) == {3, 4}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slots-per-rank", "3"], "error: 12 slots cannot hold 16 experts: at least 16 are needed"),
        (["--nodes", "2", "--min-replicas", "3"], "error: 3 replicas on different nodes need 3 nodes, there are 2"),
        (["--nodes", "3"], "error: 4 ranks cannot be dealt evenly to 3 nodes"),
        (["--domain", "law"], "error: no domain 'law'"),
        (["--ranks", "0"], "error: 0 ranks on 1 nodes: each must be at least 1"),
        (["--min-replicas", "0"], "error: min_replicas is 0, expected at least 1"),
        (["--effort", "inf"], "error: effort is inf, expected a finite number, 0 or more"),
        (["--speeds", "1,nan,1,1"], "error: speeds must be 4 numbers above 0, got (1.0, nan"),
        (["--speeds", "1,1,1,inf"], "error: speeds must be 4 numbers above 0"),
        (["--seed", "-1"], "error: seed is -1, expected 0 or more"),
        (["--max-moves", "-3"], "error: max_moves is -3, expected 0 or more"),
        (["--current", "nowhere.json"], "error: nowhere.json: No such file or directory"),
    ],
)
def test_impossible_requests_end_in_one_line(files, capsys, more, message) -> None:
    assert optimize(files, *more) == 1
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_a_bad_trace_ends_in_one_line(files, capsys) -> None:
    (files / "trace.npz").write_bytes(b"no archive")
    assert optimize(files) == 1
    said = capsys.readouterr().err
    assert "trace.npz: not a usable trace" in said
    assert said.count("\n") == 1


def test_every_command_tells_json_on_request(files, capsys) -> None:
    plan, trace, report = files / "plan.json", files / "trace.npz", files / "report"
    assert optimize(files, "--effort", "0.01", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["planned"]) == (str(plan), json.loads(plan.read_text())["planned"])
    assert main(["export", "--placement", str(plan), "--format", "vllm", "--out", str(files / "o"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(files / "o"), "format": "vllm"}
    pytest.importorskip("matplotlib")
    assert main(["explain", "--trace", str(trace), "--placement", str(plan), "--out", str(report), "--json"]) == 0
    assert str(report / "report.html") in json.loads(capsys.readouterr().out)["written"]
