"""`expertmesh check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placement.command.arguments import Json


def check(
    config: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG...",
            help="Serve configs, RayServices of KubeRay, Anyscale services, config.json of models; any number.",
        ),
    ],
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing; of a model on the hub, what is in the cache counts.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Say everything that would be refused, without GPUs and without a cluster.

    Sections and keys; options of Serve, Ray and vLLM; files of the model; applications against each other; the
    placement against the model. What this machine cannot tell is listed as "not checked". Of a config.json it says
    whether the model would be served, and how well its architecture is tested.
    """
    from cluster.check_command.run import check as run

    return run(config, offline, as_json)
