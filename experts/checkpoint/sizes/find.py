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
from experts.checkpoint.sources.hub import HubSource
from experts.checkpoint.sources.opening import is_remote_name, open_source
from placement.sizing.model import ModelFacts


def find_facts(model: str) -> tuple[ModelFacts, str]:
    """What a model takes, and the name under which a service finds it: `model.path` of a config.

    `model` is a folder with config.json and, for exact bytes, the weights; a name of the table; or a hub id or an s3://
    or gs:// folder, of which config.json and the headers are read. The table also answers for a hub id of its own that
    the hub does not. CheckpointError says what is missing.
    """
    if Path(model).is_dir():
        return _of_folder(Path(model)), os.path.abspath(model)
    known = known_model(model)
    if known is not None and model.lower() == known.name:
        return known.facts(), known.hub
    if not is_remote_name(model):
        raise CheckpointError(
            f"{model!r} is no folder, no hub id (org/name) and no name of the table: {', '.join(known_models())}"
        )
    try:
        return _of_remote(model), model
    except CheckpointError as error:
        if known is None:
            raise
        facts = known.facts()
        return replace(facts, notes=(*facts.notes, f"{error}; sized from the table of known models")), known.hub


def _of_folder(folder: Path) -> ModelFacts:
    config = ModelConfig(folder)
    facts = facts_of(config, folder.resolve().name)
    if not any(folder.glob("*.safetensors")):
        return _with(facts, None, "no file of weights is here: bytes follow from config.json")
    return _with(facts, parts_of_folder(folder, config))


def _of_remote(model: str) -> ModelFacts:
    source = open_source(model).resolved()
    config = ModelConfig(source.fetch(source.configs()))
    facts = facts_of(config, model.rstrip("/").rsplit("/", 1)[-1])
    if not isinstance(source, HubSource):
        return _with(facts, None, "headers are read from folders and from the hub: bytes follow from config.json")
    try:
        return _with(facts, parts_on_hub(source.repo, source.revision, config))
    except CheckpointError as error:
        return _with(facts, None, f"{error}; bytes follow from config.json")


def _with(facts: ModelFacts, parts: object, note: str | None = None) -> ModelFacts:
    notes = facts.notes if note is None else (*facts.notes, note)
    return replace(facts, header_bytes=parts, notes=notes)  # type: ignore[arg-type]
