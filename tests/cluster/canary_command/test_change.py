"""What `expertmesh canary` makes of a deployed config: other weights, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.canary_command.change import models_of, weights_of, with_all_for, with_models, with_weights
from placement.command.ending import CommandError

CONFIG: dict[str, Any] = yaml.safe_load((Path(__file__).parents[3] / "configs" / "tiny-two-models.yaml").read_text())


def test_other_weights_change_the_gateways_user_config_alone() -> None:
    before = copy.deepcopy(CONFIG)
    live = with_weights(models_of(CONFIG, "gateway"), "tiny-moe", {"canary": 5})
    after = with_models(CONFIG, "gateway", live)
    assert before == CONFIG
    assert weights_of(models_of(after, "gateway")) == {
        "tiny-moe": {"stable": 100, "canary": 5},
        "tiny-moe-short": {"only": 1},
    }
    [gateway] = [index for index, app in enumerate(CONFIG["applications"]) if app["name"] == "gateway"]
    for index, (was, now) in enumerate(zip(CONFIG["applications"], after["applications"], strict=True)):
        assert (was == now) == (index != gateway)
    user_config = after["applications"][gateway]["deployments"][0]["user_config"]
    user_config["models"]["tiny-moe"]["versions"]["canary"]["weight"] = 0
    assert after == CONFIG, "written as the file has it, so that `serve deploy` of the same split changes nothing"


def test_promoting_and_rolling_back_move_all_the_traffic() -> None:
    live = models_of(CONFIG, "gateway")
    promoted = with_all_for(live, "tiny-moe", "canary")
    assert weights_of(promoted)["tiny-moe"] == {"stable": 0, "canary": 100}
    assert weights_of(with_all_for(promoted, "tiny-moe", None)) == weights_of(live)
    named = copy.deepcopy(CONFIG)
    named["applications"][5]["deployments"][0]["user_config"]["models"]["tiny-moe"]["stable"] = "canary"
    assert weights_of(with_all_for(models_of(named, "gateway"), "tiny-moe", None))["tiny-moe"]["canary"] == 100


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        ("nope", {"stable": 1}, "no model 'nope'; there are tiny-moe, tiny-moe-short"),
        ("tiny-moe", {"nope": 1}, "no version 'nope'; there are stable, canary"),
        ("tiny-moe", {"stable": 0}, "every weight of tiny-moe would be 0"),
    ],
)
def test_what_cannot_be_is_refused(model: str, weights: dict[str, int], expected: str) -> None:
    with pytest.raises(CommandError, match=expected):
        with_weights(models_of(CONFIG, "gateway"), model, weights)


@pytest.mark.parametrize("app", ["llm", "nope"])
def test_an_application_that_is_no_gateway_is_named(app: str) -> None:
    with pytest.raises(CommandError, match=f"no gateway .* is named '{app}'"):
        models_of(CONFIG, app)


def test_a_gateway_whose_deployment_is_not_listed_gets_an_entry() -> None:
    bare = copy.deepcopy(CONFIG)
    live = models_of(bare, "gateway")
    bare["applications"][5].pop("deployments")
    assert models_of(bare, "gateway").models == {}
    assert models_of(with_models(bare, "gateway", live), "gateway") == live
