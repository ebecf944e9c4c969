"""From a name of a model to what sizing knows of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.architecture import facts_of
from experts.checkpoint.sizes.from_headers import parts_of_folder, parts_on_hub
from experts.checkpoint.sizes.known_models import known_model, known_models
from experts.checkpoint.sizes.mtp import with_parts
from experts.checkpoint.sources.hub import HubSource
from experts.checkpoint.sources.opening import is_remote_name, open_source
from placement.sizing.model import ModelFacts


def find_facts(model: str, mtp: bool = False) -> tuple[ModelFacts, str]:
    """What a model takes, and the name under which a service finds it: `model.path` of a config.

    `model` is a folder with config.json and, for exact bytes, the weights; a name of the table; or a hub id or an s3://
    or gs:// folder, of which config.json and the headers are read. The table also answers for a hub id of its own that
    the hub does not. `mtp`: with the layer for multi-token prediction served. CheckpointError says what is missing.
    """
    if Path(model).is_dir():
        return _of_folder(Path(model), mtp), os.path.abspath(model)
    known = known_model(model)
    if known is not None and model.lower() == known.name:
        return known.facts(mtp), known.hub
    if not is_remote_name(model):
        raise CheckpointError(
            f"{model!r} is no folder, no hub id (org/name) and no name of the table: {', '.join(known_models())}"
        )
    try:
        return _of_remote(model, mtp), model
    except CheckpointError as error:
        if known is None:
            raise
        facts = known.facts(mtp)
        return replace(facts, notes=(*facts.notes, f"{error}; sized from the table of known models")), known.hub


def _of_folder(folder: Path, mtp: bool) -> ModelFacts:
    config = ModelConfig(folder)
    facts = facts_of(config, folder.resolve().name, mtp=mtp)
    if not any(folder.glob("*.safetensors")):
        return _noted(facts, "no file of weights is here: bytes follow from config.json")
    return with_parts(facts, parts_of_folder(folder, config))


def _of_remote(model: str, mtp: bool) -> ModelFacts:
    source = open_source(model).resolved()
    config = ModelConfig(source.fetch(source.configs()))
    facts = facts_of(config, model.rstrip("/").rsplit("/", 1)[-1], mtp=mtp)
    if not isinstance(source, HubSource):
        return _noted(facts, "headers are read from folders and from the hub: bytes follow from config.json")
    try:
        parts = parts_on_hub(source.repo, source.revision, config)
    except CheckpointError as error:
        return _noted(facts, f"{error}; bytes follow from config.json")
    return with_parts(facts, parts)


def _noted(facts: ModelFacts, note: str) -> ModelFacts:
    return replace(facts, notes=(*facts.notes, note))
