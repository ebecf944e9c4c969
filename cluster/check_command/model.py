"""What the model's files say of a config: engine options, missing files, the placement. It fetches no weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.check_command.findings import Findings, Kind
from cluster.config.apps import ExpertsAppConfig, LLMAppConfig
from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from cluster.refusals.applications import experts_problems, llm_problems
from experts.checkpoint.errors import CheckpointError, UnreachableError
from experts.checkpoint.sources.base import INDEX_NAME
from experts.checkpoint.sources.opening import open_source

OFFLINE = "HF_HUB_OFFLINE"


@dataclass(frozen=True)
class ModelHere:
    """What of a model is on this machine. `folder` None: nothing, and `why` says so."""

    folder: Path | None
    complete: bool = False  # weights and tokenizer, too
    indexed: bool = False  # which tensors it has is known without its weights
    name: str = ""  # of a remote source: with its commit
    why: str = ""
    refused: bool = False  # there is no such model anywhere


def check_models(applications: Mapping[str, Any], mesh: MeshConfig | None, findings: Findings) -> None:
    """Add what options and the models tell of each other.

    `applications`: the arguments by where they stand. `mesh`: all applications, if they fit together.
    """
    seen: dict[str, ModelHere] = {}
    for where, args in applications.items():
        if not isinstance(args, ExpertsAppConfig | LLMAppConfig):
            continue
        path = args.model.path
        here = seen.setdefault(path, find_model(path))
        if here.why:
            kind = Kind.refused if here.refused else Kind.not_checked
            findings.add(kind, f"{where}.model.path: {here.why}")
        if isinstance(args, LLMAppConfig):
            lines = llm_problems(args, here.folder, here.complete, keys=False)
        else:
            lines = experts_problems(args, here.folder, here.complete, keys=False)
        findings.refuse(f"{where}.{line}" for line in lines)
    pools = [] if mesh is None else mesh.pools
    for where, args in applications.items():
        pool = next((each for each in pools if each.experts == args), None)
        if pool is not None:
            pools.remove(pool)
            _check_placement(pool.experts, pool, seen[pool.experts.model.path], where, findings)


def find_model(path: str) -> ModelHere:
    """What of the model is here, or can be fetched in a moment: config.json and the list of its files."""
    folder = Path(path)
    if folder.is_dir():
        return ModelHere(folder, complete=True, indexed=True)
    if folder.is_absolute():
        return ModelHere(None, why=f"{path} is not on this machine, so none of its files")
    try:
        source = open_source(path)
        if not source.remote:
            return ModelHere(None)  # a relative path, which has been told
        if os.environ.get(OFFLINE) and "://" in path:
            return ModelHere(None, why=f"{path} is not asked for (--offline)")
        source = source.resolved()
        return ModelHere(source.fetch(source.configs()), indexed=INDEX_NAME in source.files(), name=str(source))
    except UnreachableError as error:
        return ModelHere(None, why=str(error))
    except CheckpointError as error:
        return ModelHere(None, why=str(error), refused=not os.environ.get(OFFLINE))


def _check_placement(
    experts: ExpertsAppConfig, mesh: MeshConfig, here: ModelHere, where: str, findings: Findings
) -> None:
    """The checkpoint's experts, and whether the placement holds them."""
    if here.folder is None or not here.indexed:
        if here.folder is not None:
            findings.add(
                Kind.not_checked, f"{where}.model.path: {here.name} has no {INDEX_NAME}, so none of its tensors"
            )
        findings.add(Kind.not_checked, f"{where}: the placement against the model's layers and experts")
        return
    # Here, since it reads checkpoints.
    from cluster.mesh.planning import ModelFacts, ShardsAtHand, check_plan, read_spec

    if here.name:
        experts = experts.model_copy(update={"model": experts.model.model_copy(update={"path": here.name})})
    try:
        spec = read_spec(experts)
    except ConfigError as error:
        findings.refuse(f"{where}.{line}" for line in str(error).splitlines())
        return
    for key in ("file", "trace"):
        path = getattr(mesh.live.placement, key)
        if path is not None and not Path(path).exists():
            findings.add(Kind.not_checked, f"{where}: the placement, without placement.{key}")
            return
    try:
        shards = ShardsAtHand(mesh.num_shards, 1, mesh.experts.shards.slots_per_rank)
        check_plan(mesh.live.placement, ModelFacts(spec.num_layers, spec.num_experts), shards)
    except ConfigError as error:
        controller = f"{where.removesuffix('.args')}.deployments PlacementController user_config"
        findings.refuse(f"{controller}: {line}" for line in str(error).splitlines())
