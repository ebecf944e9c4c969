"""Models by name, for sizing without a file of theirs: the values of config.json, with their sources, in JSON."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint.hf_config import ModelConfig
from experts.checkpoint.sizes.architecture import facts_of
from placement.sizing.model import ModelFacts

TABLE = Path(__file__).with_name("known_models.json")


@dataclass(frozen=True)
class KnownModel:
    """One entry. `source` is where the original config.json is, `seen` the copy that was compared, if any."""

    name: str
    hub: str
    source: str
    seen: str
    notes: tuple[str, ...]
    config: dict[str, Any]

    def facts(self, mtp: bool = False) -> ModelFacts:
        """The model as its configuration describes it; `mtp`: with the layer for multi-token prediction served."""
        config = ModelConfig.of_values(self.config, Path(self.name) / "config.json")
        return facts_of(config, self.name, self.notes, mtp)


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """The table by name, in its order."""
    entries = json.loads(TABLE.read_text())["models"]
    return {entry["name"]: KnownModel(**{**entry, "notes": tuple(entry["notes"])}) for entry in entries}


def known_model(text: str) -> KnownModel | None:
    """The entry with this name or hub id, whatever its case."""
    wanted = text.lower()
    for entry in known_models().values():
        if wanted in (entry.name, entry.hub.lower()):
            return entry
    return None
