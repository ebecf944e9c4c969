"""How the planner's commands read lists of numbers, and options that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Trace = Annotated[Path, typer.Option(help="Routing trace: .npz, vLLM's .npy, SGLang's .pt.")]
TraceFormat = Annotated[str, typer.Option("--format", help="auto, expertmesh, olmoe, vllm or sglang.")]
NumExperts = Annotated[int | None, typer.Option(help="Experts of a layer, if the trace does not say.")]
Domain = Annotated[str | None, typer.Option(help="Only the tokens of this domain.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress goes to standard error.")]


def layers_argument(text: str) -> tuple[int, ...]:
    """Decoder layers: `3,4,5`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layers like 3,4,5") from None


def slots_argument(text: str) -> int | tuple[int, ...]:
    """`9`, or one number for each rank: `9,9,8,0`."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number of slots, nor a list like 9,9,8") from None
    return numbers[0] if len(numbers) == 1 else numbers


def step_tokens_argument(text: str) -> tuple[int, ...]:
    """Sizes of steps in tokens: `32,256,2048`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of sizes like 32,256") from None


def speeds_argument(text: str) -> tuple[float, ...]:
    """Relative speeds of the ranks: `1,1,0.5,0.5`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of speeds like 1,1,0.5") from None
