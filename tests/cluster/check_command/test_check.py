"""`expertmesh check`: the configs that ship, spoiled ones, files that are none, models that are not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check_command import model
from cluster.check_command.findings import Findings, Kind
from cluster.check_command.run import check_file
from experts.checkpoint.errors import CheckpointError, UnreachableError
from tests.support.command import ROOT, run_here
from tests.support.serve.shipped_configs import CONFIGS, SERVED

TINY = CONFIGS / "tiny-cpu.yaml"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(model.OFFLINE, "1")


def texts(findings: Findings, kind: Kind) -> list[str]:
    return [finding.text for finding in findings.found if finding.kind is kind]


def changed(folder: Path, change: Any) -> Path:
    """The tiny config after a change to its applications by name."""
    data = yaml.safe_load(TINY.read_text())
    change(data, {app["name"]: app for app in data["applications"]})
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    "path", [*SERVED, CONFIGS / "kuberay/qwen3-30b-a3b/serve.yaml"], ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_config_that_ships_is_accepted(path: Path) -> None:
    findings = check_file(path)
    assert texts(findings, Kind.refused) == []
    tiny = path.name.startswith("tiny")
    assert (texts(findings, Kind.not_checked) == []) is tiny, "what is not on this machine is said"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("kuberay/base/rayservice.yaml", "spec.serveConfigV2 is 'SERVE_CONFIG', expected the text of a Serve config"),
        ("kuberay/base/kustomization.yaml", "holds no Serve config; expected a Serve config"),
        ("images/cpu.Dockerfile", "not YAML"),
        ("nowhere.yaml", "cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_config_is_told(name: str, told: str) -> None:
    [line] = texts(check_file(CONFIGS / name), Kind.refused)
    assert line.startswith(f"{CONFIGS / name}: ")
    assert told in line


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    def spoil(data: dict[str, Any], apps: dict[str, Any]) -> None:
        data["http_options"]["prot"] = 1
        apps["experts"]["args"]["shards"]["tipo"] = 1
        apps["experts"]["args"]["shards"]["num_threads"] = "many"
        apps["experts"]["deployments"][0]["num_replicas"] = 0
        apps["experts"]["deployments"][1]["user_config"]["placement"]["policy"] = "best"
        apps["llm"]["args"]["routers"]["engine_kwargs"]["max_model_lenn"] = 1
        apps["llm"]["args"]["routers"]["engine_kwargs"]["tensor_parallel_size"] = 0
        apps["llm"]["deployments"] = [{"name": "Router", "max_ongoing_request": 4}]
        apps["console"]["args"]["deployment_config"]["num_replica"] = 2

    path = changed(tmp_path, spoil)
    told = texts(check_file(path), Kind.refused)
    for key in (
        "http_options.prot is unknown to Serve",
        "applications[0].args.shards.tipo: unknown key",
        "applications[0].args.shards.num_threads",
        "applications[0].deployments[0].num_replicas is 0",
        "applications[0].deployments[1].user_config.placement.policy",
        "applications[1].args.routers.engine_kwargs.max_model_lenn",
        "applications[1].args.routers",  # a rule of the section: tensor_parallel_size
        "applications[1].deployments[0].max_ongoing_request",
        "applications[2].args.deployment_config.num_replica",
    ):
        assert [line for line in told if line.startswith(f"{path}: {key}")], (key, told)


def test_all_contradictions_are_told_at_once(tmp_path: Path) -> None:
    def contradict(data: dict[str, Any], apps: dict[str, Any]) -> None:
        apps["llm"]["args"]["model"] = {**apps["llm"]["args"]["model"], "id": "other"}
        apps["llm"]["args"]["experts_app"] = "nobody"
        apps["console"]["args"]["llm_apps"] = ["nobody"]

    told = " ".join(texts(check_file(changed(tmp_path, contradict)), Kind.refused))
    for part in ("model.id is 'tiny-moe' for the shards and 'other'", "experts_app is 'nobody'", "llm_apps are"):
        assert part in told


def test_autoscaling_is_checked_against_serve(tmp_path: Path) -> None:
    def scale(data: dict[str, Any], apps: dict[str, Any]) -> None:
        apps["experts"]["deployments"][0] = {
            "name": "ExpertShard",
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": 3,
                "upscale_delay": 3,
                "policy": {"policy_function": "cluster.autoscaling.policies:shards"},
            },
        }

    told = texts(check_file(changed(tmp_path, scale)), Kind.refused)
    assert any("deployments[0].autoscaling_config.upscale_delay is unknown to Serve" in line for line in told), told


def test_the_placement_is_checked_against_the_model(tmp_path: Path) -> None:
    def shrink(data: dict[str, Any], apps: dict[str, Any]) -> None:
        apps["experts"]["args"]["shards"]["slots_per_rank"] = 9

    [line] = texts(check_file(changed(tmp_path, shrink)), Kind.refused)
    assert "3 shards of 9 slots have 27 slots in a layer, 32 experts of 2 replicas need 64" in line


def at(path: str) -> Any:
    def change(data: dict[str, Any], apps: dict[str, Any]) -> None:
        for name in ("experts", "llm"):
            apps[name]["args"]["model"] = {**apps[name]["args"]["model"], "path": path}

    return change


def test_a_model_on_other_machines_is_not_checked(tmp_path: Path) -> None:
    findings = check_file(changed(tmp_path, at("/models/nowhere")))
    assert not findings.refused
    told = texts(findings, Kind.not_checked)
    assert len([line for line in told if "/models/nowhere is not on this machine" in line]) == 2
    assert any("the placement against the model's layers and experts" in line for line in told)


def test_a_relative_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    told = texts(check_file(changed(tmp_path, at("./some/folder/nowhere"))), Kind.refused)
    assert [line for line in told if "model.path: './some/folder/nowhere' does not exist" in line]


@pytest.mark.parametrize(
    ("error", "offline", "kind"),
    [
        (UnreachableError("org/name: the hub does not answer"), False, Kind.not_checked),
        (CheckpointError("org/name: no such model"), False, Kind.refused),
        (CheckpointError("org/name: not in the cache"), True, Kind.not_checked),
    ],
)
def test_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, offline: bool, kind: Kind
) -> None:
    class Source:
        remote = True

        def resolved(self) -> None:
            raise error

    if not offline:
        monkeypatch.delenv(model.OFFLINE)
    monkeypatch.setattr(model, "open_source", lambda path: Source())
    findings = check_file(changed(tmp_path, at("org/name")))
    assert findings.refused is (kind is Kind.refused)
    assert len([line for line in texts(findings, kind) if line.endswith(f"model.path: {error}")]) == 2


def test_secrets_and_keys_that_are_not_here_are_said(tmp_path: Path) -> None:
    def ask(data: dict[str, Any], apps: dict[str, Any]) -> None:
        apps["experts"]["args"]["mesh"] = {"secret_env": "NOBODY_SETS_THIS"}
        for name in ("llm", "console"):
            apps[name]["args"].setdefault("http", {})["keys_file"] = str(tmp_path / "keys.yaml")

    path = changed(tmp_path, ask)
    told = texts(check_file(path), Kind.not_checked)
    assert len([line for line in told if "http.keys_file" in line]) == 2
    assert any("mesh.secret_env: NOBODY_SETS_THIS is not set on this machine" in line for line in told)
    (tmp_path / "keys.yaml").write_text("- {name: a}\n")
    assert any("keys.yaml" in line for line in texts(check_file(path), Kind.refused))


def test_the_command_tells_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("check", TINY, "--offline") == 0
    assert capsys.readouterr().out == f"{TINY}: accepted\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("applications: 3\n")
    assert run_here("check", TINY, bad, "--offline") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 files: 1 accepted, 1 refused"
    assert run_here("check", TINY, bad, "--offline", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert [(each["file"], each["accepted"]) for each in told["files"]] == [(str(TINY), True), (str(bad), False)]
    assert told["accepted"] is False


def test_what_size_writes_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sized.yaml"
    folder = ROOT / "examples" / "tiny-moe"
    assert run_here("size", folder, "--isl", 200, "--osl", 100, "--rate", 5, "--write", file, "--json") == 0
    capsys.readouterr()
    assert texts(check_file(file), Kind.refused) == []


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        (
            {
                "architectures": ["MixtralForCausalLM"],
                **{"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
                **{"hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu"},
            },
            Kind.served,
            "MixtralForCausalLM (mixtral): small random checkpoints give the tokens of vLLM's own engine; 32 layers",
        ),
        (
            {"architectures": ["NemotronHForCausalLM"]},
            Kind.refused,
            "NemotronHForCausalLM is refused: its experts have",
        ),
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, Kind.refused, "model_type 'new' is unknown"),
        ({"architectures": ["NewForCausalLM"]}, Kind.refused, "model_type is None, expected a string"),
    ],
)
def test_a_config_of_a_model_says_what_becomes_of_it(
    tmp_path: Path, values: dict[str, Any], kind: Kind, told: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    findings = check_file(path)
    [line] = texts(findings, kind)
    assert line.startswith(str(path))
    assert told in line
    assert findings.refused is (kind is Kind.refused)


def test_a_model_that_nobody_compared_is_served_with_a_warning(tmp_path: Path) -> None:
    values = {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "num_hidden_layers": 62}
    values |= {"num_local_experts": 256, "num_experts_per_tok": 8, "hidden_size": 3072, "intermediate_size": 1536}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "hidden_act": "silu"}))
    findings = check_file(path)
    assert not findings.refused
    assert ["compare some answers with plain vLLM's" in line for line in texts(findings, Kind.warning)] == [True]
