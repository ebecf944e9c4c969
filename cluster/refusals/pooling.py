"""What of a config does not go with routers whose engine pools: it makes embeddings, scores or classes, no tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.config.apps import LLMAppConfig
from cluster.refusals.model_files import read_config
from cluster.router.pooling import NO_SIGNATURES
from experts.vllm_plugin.pooling.options import pools, refused_with_pooling


def pooling_problems(config: LLMAppConfig, folder: Path | None) -> Iterator[str]:
    """One line for each part that does not go along; none for routers that generate.

    `folder` is the model's, None where that is not here: then the engine options alone tell what the engine does.
    """
    options = config.routers.engine_kwargs
    try:
        values = None if folder is None else read_config(folder)
    except ValueError:
        values = None  # which is told elsewhere
    if not pools(options, values, folder):
        return
    if config.pools is not None:
        yield "pools: prefill and decode apart does not go with an engine that pools, which decodes nothing"
    if config.lora_config is not None:
        yield "lora_config does not go with an engine that pools: nobody has tried adapters there"
    if config.routers.expert_signatures is not None:
        yield NO_SIGNATURES
    yield from (f"routers.engine_kwargs.{line}" for line in refused_with_pooling(options))
