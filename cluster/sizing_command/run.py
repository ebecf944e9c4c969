"""Answer a question of `expertmesh size`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.config.parse import ConfigError
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.sizes.find import find_facts
from experts.checkpoint.sizes.known_models import known_models
from placement.command.ending import CommandError, Ending, note, tell
from placement.sizing.demand import Demand
from placement.sizing.errors import NoLayoutError, SizingError

KV_VALUE_BYTES = {"auto": 2.0, "fp8": 1.0}


@dataclasses.dataclass(frozen=True)
class Question:
    """The command line. `demand`: fields of placement.sizing.demand.Demand."""

    model: str
    gpu: str
    demand: dict[str, float]
    price_per_gpu_hour: float | None
    alternatives: int
    write: Path | None


def answer(question: Question, as_json: bool) -> None:
    """Print the layout, and write its config where one is asked for. Raises CommandError."""
    try:
        _answer(question, as_json)
    except (NoLayoutError, ConfigError, CheckpointError) as error:
        raise CommandError(*str(error).splitlines()) from None
    except SizingError as error:
        raise CommandError(str(error), ending=Ending.USAGE) from None
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None


def table(as_json: bool) -> None:
    """Print the table of known models."""
    from cluster.sizing_command.models import model_as_json, table_of

    models = [known.facts() for known in known_models().values()]
    tell(as_json, [model_as_json(facts) for facts in models], table_of(models))


def _answer(question: Question, as_json: bool) -> None:
    # Here, since these import numba, which the table does without.
    from cluster.sizing_command.figures import as_json as document_of
    from cluster.sizing_command.text import lines_of
    from placement.sizing.gpus import gpu_named
    from placement.sizing.sizing import size

    if question.alternatives < 0:
        raise SizingError(f"alternatives is {question.alternatives}, expected at least 0")
    gpu = gpu_named(question.gpu)
    demand = Demand(**question.demand)  # type: ignore[arg-type]
    facts, path = find_facts(question.model)
    sizing = size(
        facts, gpu, demand, price_per_gpu_hour=question.price_per_gpu_hour, alternatives=question.alternatives
    )
    if question.write is not None:
        from cluster.sizing_command.serve_config import write_config

        write_config(sizing, path, question.write)
    tell(as_json, document_of(sizing), lines_of(sizing))
    if question.write is not None:
        note(f"{question.write}: written, and accepted by the checks that need no GPU")
