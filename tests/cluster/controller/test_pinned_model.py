"""A model's name that leaves its contents open is settled once, by whoever builds an application first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.config.apps import ExpertsAppConfig, LLMAppConfig
from cluster.config.parse import ConfigError, parse
from cluster.controller import pinned_model
from cluster.controller.pinned_model import with_pinned_model
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.sources.hub import HubSource

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
OLD, NEW = "a" * 40, "b" * 40


@dataclass
class Hub:
    """What the hub says `main` is, the files it was asked for, and what this Serve agreed on."""

    head: str = OLD
    fetched: list[str] = field(default_factory=list)
    agreed: dict[str, str] = field(default_factory=dict)

    def agree(self, key: str, propose: Callable[[], str]) -> str:
        if key not in self.agreed:
            self.agreed[key] = propose()
        return self.agreed[key]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()

    def fetch(source: HubSource, names: list[str]) -> Path:
        hub.fetched += [f"{source}/{name}" for name in names]
        if source.repo == "org/gated":
            raise CheckpointError(f"{source}: the model is gated")
        return Path()

    def resolved(source: HubSource) -> HubSource:
        return source if len(source.revision or "") == 40 else HubSource(source.repo, hub.head)

    monkeypatch.setattr(HubSource, "resolved", resolved)
    monkeypatch.setattr(HubSource, "fetch", fetch)
    monkeypatch.setattr(pinned_model, "agree", hub.agree)
    return hub


def experts(path: str) -> ExpertsAppConfig:
    return parse(ExpertsAppConfig, {"model": {"id": "m", "path": path}})


def llm(path: str) -> LLMAppConfig:
    return parse(LLMAppConfig, {"model": {"id": "m", "path": path}})


def test_both_applications_get_one_commit_though_the_branch_moves(hub: Hub) -> None:
    first = with_pinned_model(experts("org/name"))
    hub.head = NEW
    second = with_pinned_model(llm("org/name"))
    assert first.model.path == second.model.path == f"org/name@{OLD}"
    assert hub.fetched == [f"org/name@{OLD}/config.json"] * 2
    assert with_pinned_model(llm("org/name@main")).model.path == f"org/name@{NEW}", "another name, another agreement"
    dumped: dict[str, Any] = first.model_dump(exclude_unset=True)
    assert dumped["model"] == {"id": "m", "path": f"org/name@{OLD}"}, "what the replicas get"
    assert with_pinned_model(first) == first


def test_a_folder_stays_as_it_is(hub: Hub) -> None:
    config = experts(str(TINY))
    assert with_pinned_model(config) is config
    assert (hub.fetched, hub.agreed) == ([], {})


def test_a_model_that_cannot_be_had_is_named(hub: Hub) -> None:
    with pytest.raises(ConfigError, match=f"^model.path: org/gated@{OLD}: the model is gated$"):
        with_pinned_model(llm("org/gated"))
