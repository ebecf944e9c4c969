"""The application `gateway`: several models behind one address, and each model's traffic split over versions."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config.http_sections import KeysSection
from experts.protocol.settings import StrictModel

GATEWAY = "Gateway"  # the deployment
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")


class VersionSection(StrictModel):
    """One version of a model: an application of routers."""

    app: str = Field(min_length=1, description="Name of the application that holds its routers.")
    weight: int = Field(
        default=1,
        ge=0,
        le=1_000_000,
        description="Its share of the traffic, of the sum of all weights. 0: only what asks for it by the header "
        "x-expertmesh-version, and what no other version can take.",
    )


class VersionsSection(StrictModel):
    """A model as clients name it, which is the `model.id` of each of its versions."""

    versions: dict[str, VersionSection] = Field(min_length=1, description="Its versions by name; one is enough.")
    stable: str | None = Field(
        default=None, description="The version that `expertmesh canary rollback` goes back to; by default the first."
    )
    split_by: Literal["request", "key", "header"] = Field(
        default="request",
        description="request: each request alone. key: all requests of one API key go to one version. header: all "
        "with the same value of split_header do.",
    )
    split_header: str | None = Field(default=None, description="Name of that header, such as x-session-id.")

    @field_validator("versions")
    @classmethod
    def _fit(cls, value: dict[str, VersionSection]) -> dict[str, VersionSection]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name: expected up to 64 letters, digits, '.', '_' and '-'")
        if not any(version.weight for version in value.values()):
            raise ValueError("every weight is 0: one version has to take the traffic")
        apps = [version.app for version in value.values()]
        if len(set(apps)) < len(apps):
            raise ValueError("two versions have the same app")
        return value

    @field_validator("split_header")
    @classmethod
    def _is_a_header(cls, value: str | None) -> str | None:
        if value is not None and not HEADER.fullmatch(value):
            raise ValueError(f"{value!r} is no name of a header")
        return None if value is None else value.lower()

    @model_validator(mode="after")
    def _agree(self) -> VersionsSection:
        if (self.split_by == "header") != (self.split_header is not None):
            raise ValueError("split_by: header and split_header go together: set both or neither")
        if self.stable is not None and self.stable not in self.versions:
            raise ValueError(f"stable is {self.stable!r}, expected one of {', '.join(self.versions)}")
        return self

    @property
    def stable_version(self) -> str:
        """The version to go back to."""
        return self.stable or next(iter(self.versions))

    def weighted(self, weights: dict[str, int]) -> VersionsSection:
        """The same with other weights for some versions. Raises KeyError for an unknown one, ValueError if none is left
        with traffic."""
        data = self.model_dump(exclude_unset=True)
        for name, weight in weights.items():
            data["versions"][name]["weight"] = weight
        return VersionsSection.model_validate(data)


class GatewayLive(StrictModel):
    """`user_config` of the deployment `Gateway`: what changes while it serves."""

    models: dict[str, VersionsSection] = Field(
        default_factory=dict, description="The models by the names clients send."
    )

    @field_validator("models")
    @classmethod
    def _named(cls, value: dict[str, VersionsSection]) -> dict[str, VersionsSection]:
        if any(not name.strip() for name in value):
            raise ValueError("a model's name is empty")
        return value


class GatewayHttpSection(KeysSection):
    """Keys and bounds of the gateway. Routers check keys as well, count with the gateway's ledger what each uses
    (http.ledger_app), and have bounds of their own."""

    max_body_bytes: int = Field(
        default=8 * 2**20, ge=1024, description="Largest request body; larger ones get status 413."
    )
    max_requests: int = Field(
        default=4096, ge=1, description="Most requests that one gateway passes on at a time; others get status 503."
    )


class GatewayAppConfig(StrictModel):
    """Arguments of `serve_app:build_gateway`: one address for several models."""

    http: GatewayHttpSection = Field(default=GatewayHttpSection(), description="API keys and bounds.")
    deployment_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray Serve options of the deployment, including num_replicas and ray_actor_options.",
    )
