"""Which contents of a model the routers and shards of one Serve have, if its name leaves that open."""

from __future__ import annotations

import logging
from typing import TypeVar

from cluster.config.apps import ExpertsAppConfig, LLMAppConfig
from cluster.config.parse import ConfigError
from cluster.ray_joints import agree, show_data_plane_log
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.sources.base import CONFIG_NAME
from experts.checkpoint.sources.opening import open_source

logger = logging.getLogger("ray.serve")

C = TypeVar("C", ExpertsAppConfig, LLMAppConfig)


def with_pinned_model(config: C) -> C:
    """The config with the commit, or digest, in model.path; as it is if that is a folder or has one.

    Whoever asks first decides for as long as this Serve runs, so that applications that are built or replaced at
    different times do not get different weights. Also fetches config.json, which shows whether the model may be read.
    Raises ConfigError with the model and the reason.
    """
    written = config.model.path
    try:
        source = open_source(written)
        if not source.remote:
            return config
        show_data_plane_log()
        pinned = agree(f"model {written}", lambda: str(source.resolved()))
        open_source(pinned).fetch([CONFIG_NAME])
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None
    if pinned != written:
        logger.info("model.path %s is %s while this Serve runs; write that to keep it longer", written, pinned)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": pinned})})
