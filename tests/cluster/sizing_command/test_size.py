"""The command as a user calls it: what it prints, its exit status, and that its config is accepted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config.serve_file import MeshConfig
from cluster.refusals.applications import refuse_experts, refuse_llm
from experts.checkpoint.sizes.known_models import known_models
from placement.traces.trace import ActivationTrace
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


def test_a_layer_for_multi_token_prediction_is_counted_and_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sized.yaml"
    asked = ("deepseek-v3", "--gpu", "b200", *SMALL, "--alternatives", "0", "--mtp")
    status, out, _ = told(capsys, *asked, "--write", str(file))
    assert status == 0
    assert "58 layers and one for MTP of 256 experts" in out
    assert " slots x 59 layers" in out
    assert "memory is counted alone: times are those without guesses" in out
    config = MeshConfig.from_file(file)
    refuse_llm(config.llm, complete=False, keys=False)
    assert config.experts.model.mtp
    assert config.llm.routers.engine_kwargs["speculative_config"]["method"] == "mtp"


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


def test_shards_that_offload_are_sized(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """More memory: more experts in it, more hits, more speed; and a trace is read."""
    ids = np.random.default_rng(0).integers(0, 32, (600, 4, 4)).astype(np.int16)
    ActivationTrace(ids, 32).save(tmp_path / "trace.npz")
    asked = (str(TINY_MOE), "--offload", "--headroom", "0", "--trace", str(tmp_path / "trace.npz"), "--json")
    whole = json.loads(told(capsys, *asked, "--device-gb", "9")[1])
    assert (whole["resident_fraction"], whole["speeds"][0]["tokens_per_s"]["value"]) == (1, 1)
    each, others = whole["resident"]["value"] / whole["slots_per_shard"], 9e9 - whole["room"]["value"]
    found = []
    for slots in (8, 24):
        status, out, _ = told(capsys, *asked, "--device-gb", str((others + (slots + 0.5) * each) / 1e9))
        assert status == 0
        found.append(json.loads(out))
        assert found[-1]["resident_slots"] == slots
        assert {each["basis"] for each in figures_in(found[-1])} <= {"headers", "config", "estimated", "given"}
    for answer in found:
        assert answer["resident"]["value"] <= answer["room"]["value"]
        assert -(-answer["resident_fraction"] * answer["slots_per_shard"] // 1) == answer["resident_slots"]
        for speed in answer["speeds"]:
            assert 0 < speed["tokens_per_s"]["value"] <= speed["tokens_per_s_with_prefetch"]["value"] <= 1
    hits = [answer["speeds"][0]["hit_rate"]["value"] for answer in found]
    assert hits == sorted(hits)
    third = ("--device-gb", str((others + 8.5 * each) / 1e9))
    on_cpus = json.loads(told(capsys, *asked, *third, "--cpu-shards")[1])
    assert (on_cpus["layers_share"], found[0]["layers_share"]) == (True, False)
    assert on_cpus["speeds"] != found[0]["speeds"]
    status, out, _ = told(capsys, *asked[:-1], *third)
    assert "each layer has its own (GPUs)" in out
    assert f"resident_fraction: {found[0]['resident_fraction']:g}" in out
    assert "tokens/s of all resident" in out


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--offload", "--device-gb", "0.5"), 1, "an expert of each layer takes"),
        (("--offload", "--shards", "33"), 2, "shards is 33, expected at most the 32 experts of a layer"),
        (("--offload", "--copy-gb-per-s", "0"), 2, "copy_bytes_per_s is 0.0, expected more than 0"),
        (("--offload", "--write", "x.yaml"), 2, "expected neither --write nor --price-per-gpu-hour beside --offload"),
        (("--shards", "2"), 2, "expected --offload beside --shards"),
        (("--cpu-shards",), 2, "expected --offload beside --shards, --device-gb, --cpu-shards"),
        (("--offload", "--trace", "missing.npz"), 1, "missing.npz"),
    ],
)
def test_what_cannot_be_sized_with_offload_is_named(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, expected: str
) -> None:
    found, _, err = told(capsys, str(TINY_MOE), *arguments)
    assert found == status
    assert expected in " ".join(err.replace("│", " ").split())
