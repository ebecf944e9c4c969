"""Series of a gateway: what came of the requests for each version of each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.observability.series import Samples, Series


@dataclass
class VersionCounts:
    """What one gateway counted for one version since it started."""

    requests: int = 0
    errors: int = 0
    taken_over: int = 0
    retries: int = 0
    first_bytes: int = 0
    first_byte_s: float = 0.0
    duration_s: float = 0.0
    open: int = 0


GatewayView = Mapping[tuple[str, str], VersionCounts]  # by model and version


def _by_version(name: str, value: Callable[[VersionCounts], float], description: str) -> Series[GatewayView]:
    def samples(view: GatewayView) -> Samples:
        return {place: value(counts) for place, counts in view.items()}

    kind = "gauge" if name == "version_open_requests" else "counter"
    return Series(name, kind, description, samples, ("model", "version"))  # type: ignore[arg-type]


GATEWAY_SERIES: tuple[Series[GatewayView], ...] = (
    _by_version("version_requests", lambda c: c.requests, "Requests that the version answered, or should have"),
    _by_version(
        "version_errors",
        lambda c: c.errors,
        "Those of them with a status of 500 or more, without any router, or with an answer that broke off",
    ),
    _by_version(
        "version_taken_over", lambda c: c.taken_over, "Those of them that were another version's, which had no router"
    ),
    _by_version("version_retries", lambda c: c.retries, "Attempts at a router of the version that gave no answer"),
    _by_version("version_answers", lambda c: c.first_bytes, "Answers that have begun"),
    _by_version(
        "version_first_byte_seconds", lambda c: c.first_byte_s, "Sum of the times to the beginning of an answer"
    ),
    _by_version("version_duration_seconds", lambda c: c.duration_s, "Sum of the times to the end of a request"),
    _by_version("version_open_requests", lambda c: c.open, "Requests that are running"),
)
