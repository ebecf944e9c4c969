"""Refusals as Serve's build task reports them: their lines alone, at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ray.serve.exceptions import RayServeException

from cluster.config.parse import ConfigError


class RefusedError(ConfigError, RayServeException):
    """A ConfigError whose message Serve shows as it is.

    Any other exception makes Ray repeat the build three times, and the message has the frames of each function.
    """


@contextlib.contextmanager
def refusals_for_serve() -> Iterator[None]:
    """Turn ConfigError into RefusedError."""
    try:
        yield
    except ConfigError as error:
        raise RefusedError(str(error)) from None
