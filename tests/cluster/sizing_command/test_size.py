"""The command as a user calls it: what it prints, its exit status, and that its config is accepted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config.serve_file import MeshConfig
from cluster.refusals.applications import refuse_experts, refuse_llm
from experts.checkpoint.sizes.known_models import known_models
from tests.support.command import run_here

ROOT = Path(__file__).parents[3]
TINY_MOE = ROOT / "examples" / "tiny-moe"
SMALL = ["--isl", "200", "--osl", "100", "--rate", "5"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = run_here("size", *arguments)
    out, err = capsys.readouterr()
    return status, out, err


def figures_in(value: Any) -> list[dict[str, Any]]:
    """Every mapping with a value and a unit, at any depth."""
    if isinstance(value, dict):
        own = [value] if {"value", "unit"} <= set(value) else []
        return own + [found for each in value.values() for found in figures_in(each)]
    return [found for each in value for found in figures_in(each)] if isinstance(value, list) else []


def test_the_answer_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capsys, "gpt-oss-20b", *SMALL, "--price-per-gpu-hour", "2.5")
    assert status == 0
    for part in ("KV cache", "activations", "CUDA context", "pairs", "expert slots", "% free", "lost shard", "an hour"):
        assert part in out, part
    assert "the split does not pay here" in out
    assert all(f"[{basis}]" in out for basis in ("config", "estimated"))


def test_every_figure_of_the_json_has_an_origin(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capsys, str(TINY_MOE), *SMALL, "--json", "--price-per-gpu-hour", "1")
    assert status == 0
    answer = json.loads(out)
    found = figures_in(answer)
    assert len(found) > 40
    assert {figure["basis"] for figure in found} <= {"headers", "config", "nominal", "measured", "estimated", "given"}
    assert answer["model"]["router_weights"]["basis"] == "headers"
    lines = answer["layout"]["shard_memory"]["lines"]
    assert sum(line["value"] for line in lines) == pytest.approx(answer["layout"]["shard_memory"]["total"]["value"])


def test_a_router_on_several_gpus_is_counted_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "sized.yaml"
    asked = ("qwen3-30b-a3b", *SMALL, "--router-gpus", "2", "--alternatives", "0")
    status, out, _ = told(capsys, *asked, "--write", str(file))
    assert status == 0
    assert "router(s) of 2 GPUs and" in out
    assert "memory of each GPU of a router" in out
    config = MeshConfig.from_file(file)
    refuse_llm(config.llm, complete=False, keys=False)
    assert config.llm.routers.workers == 2
    status, out, _ = told(capsys, *asked, "--json")
    layout = json.loads(out)["layout"]
    assert layout["router_gpus"] == 2
    assert layout["gpus"]["value"] == layout["services"] * (2 * layout["routers"] + layout["shards"])
    assert layout["step_shares"]["adding up among a router's GPUs"]["value"] > 0


@pytest.mark.parametrize("name", list(known_models()))
def test_the_config_of_every_known_model_is_accepted(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sized.yaml"
    asked = ("--gpu", "b200", *SMALL, "--alternatives", "0", "--write", str(file), "--json")
    status, out, _ = told(capsys, name, *asked)
    assert status == 0
    layout = json.loads(out)["layout"]
    config = MeshConfig.from_file(file)
    refuse_experts(config.experts, complete=False)
    refuse_llm(config.llm, complete=False, keys=False)
    assert (config.num_shards, config.llm.routers.count) == (layout["shards"], layout["routers"])
    assert config.experts.shards.slots_per_rank == layout["slots_per_shard"]
    assert config.experts.model == config.llm.model
    assert config.experts.model.path == known_models()[name].hub


def test_the_config_of_a_folder_is_accepted_with_its_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "sized.yaml"
    status, _, err = told(capsys, str(TINY_MOE), *SMALL, "--kv-dtype", "fp8", "--write", str(file))
    assert (status, "accepted" in err) == (0, True)
    config = MeshConfig.from_file(file)
    refuse_experts(config.experts)
    refuse_llm(config.llm, keys=False)
    assert config.llm.routers.engine_kwargs["kv_cache_dtype"] == "fp8"
    assert config.llm.routers.engine_kwargs["max_model_len"] <= 2048


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capsys, "--models")
    assert status == 0
    assert len(out.splitlines()) == 1 + len(known_models())
    status, out, _ = told(capsys, "--models", "--json")
    assert [entry["name"] for entry in json.loads(out)] == list(known_models())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["mixtral-8x7b", "--gpu", "l4"], 1, "shards needs"),
        (["no-such-model"], 1, "is no folder"),
        (["mixtral-8x7b", "--gpu", "h999"], 2, "GPU 'h999' is unknown"),
        (["mixtral-8x7b", "--rate", "0"], 2, "rate is 0.0"),
        (["mixtral-8x7b", "--alternatives", "-1"], 2, "alternatives is -1"),
        ([], 2, "expected either a model"),
    ],
)
def test_refusals_are_one_line_with_a_status(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = told(capsys, *arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_sizing_needs_no_torch() -> None:
    """Nor an engine: it runs on a laptop in seconds."""
    code = (
        "import sys, cluster.command.size, cluster.sizing_command.run, cluster.sizing_command.serve_config\n"
        "from experts.checkpoint.sizes.find import find_facts\n"
        f"find_facts({str(TINY_MOE)!r})\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'torch', 'vllm', 'ray', 'transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
