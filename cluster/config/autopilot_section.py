"""The section `autopilot` of the controller's user_config: when the placement follows the traffic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from experts.protocol.settings import StrictModel

AutopilotMode = Literal["off", "advise", "auto"]


class AutopilotSection(StrictModel):
    """The loop that observes traffic, notices drift, plans, moves experts, and checks whether that helped."""

    mode: AutopilotMode = Field(
        default="off",
        description="off: routers report nothing; advise: /expertmesh/status and /expertmesh/history say what it would "
        "do; auto: it does it.",
    )
    window_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds of traffic judged as one. Drift is believed after two windows.",
    )
    horizon_s: float = Field(
        default=3600.0,
        gt=0,
        description="How long traffic is expected to stay as it is: what a plan saves in that time must be more than "
        "its move costs.",
    )
    cool_down_s: float = Field(
        default=300.0, ge=0, description="Pause after a plan was carried out or left, before the next one."
    )
    max_bytes_per_min: float | None = Field(
        default=None,
        gt=0,
        description="Most bytes of weights that its plans move in a minute, averaged over cool_down_s. null: as many "
        "as are worth it.",
    )
    min_drift: float = Field(
        default=0.02,
        ge=0,
        description="Excess of measured over planned step cost, as a share of it, below which nothing is planned, "
        "however certain it is.",
    )
    min_gain: float = Field(
        default=0.01, ge=0, description="Share of the step cost that a plan must save, beyond sampling noise."
    )
    min_window_tokens: int = Field(
        default=256, ge=1, description="A window with fewer sampled tokens goes on until it has them."
    )
