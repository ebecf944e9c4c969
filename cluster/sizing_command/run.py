"""Answer a question of `expertmesh size`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    mtp: bool


@dataclasses.dataclass(frozen=True)
class OffloadAsked:
    """The command line with --offload; rates and memory in 10^9 bytes."""

    model: str
    gpu: str
    demand: dict[str, float]
    shards: int
    copy_gb_per_s: float
    device_gb: float | None
    trace: Path | None
    cpu_shards: bool
    mtp: bool


def answer(question: Question, as_json: bool) -> None:
    """Print the layout, and write its config where one is asked for. Raises CommandError."""
    _refusing(lambda: _answer(question, as_json))


def answer_offload(asked: OffloadAsked, as_json: bool) -> None:
    """Print what shards that offload have in memory, and what it costs. Raises CommandError."""
    _refusing(lambda: _answer_offload(asked, as_json))


def _refusing(act: Callable[[], None]) -> None:
    try:
        act()
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
    facts, path = find_facts(question.model, question.mtp)
    sizing = size(
        facts, gpu, demand, price_per_gpu_hour=question.price_per_gpu_hour, alternatives=question.alternatives
    )
    if question.write is not None:
        from cluster.sizing_command.serve_config import write_config

        write_config(sizing, path, question.write)
    tell(as_json, document_of(sizing), lines_of(sizing))
    if question.write is not None:
        note(f"{question.write}: written, and accepted by the checks that need no GPU")


def _answer_offload(asked: OffloadAsked, as_json: bool) -> None:
    from cluster.sizing_command.offload import as_json as document_of
    from cluster.sizing_command.offload import lines_of
    from placement.sizing.gpus import gpu_named
    from placement.sizing.offload import OffloadQuestion, size_offload
    from placement.traces.trace import ActivationTrace, TraceError

    facts, _ = find_facts(asked.model, asked.mtp)
    try:
        trace = None if asked.trace is None else ActivationTrace.load_npz(asked.trace)
    except (TraceError, ValueError) as error:
        raise CommandError(f"{asked.trace}: {error}") from None
    device_bytes = None if asked.device_gb is None else 1e9 * asked.device_gb
    question = OffloadQuestion(asked.shards, 1e9 * asked.copy_gb_per_s, device_bytes, trace, asked.cpu_shards)
    demand = Demand(**asked.demand)  # type: ignore[arg-type]
    sizing = size_offload(facts, gpu_named(asked.gpu), demand, question)
    tell(as_json, document_of(sizing), lines_of(sizing))
