"""The sections of a config: what a user may say of the model, the shards, the placement, the routers and HTTP.

Two Serve applications read them: `experts` (model, shards, placement, membership) and `llm` (model, routers, transport,
deadlines, http). A key stands in one section only, so that editing one application's section never restarts the other.
Unknown keys are errors; units are in the names; a default that the data plane has too is read from there.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from experts.protocol.settings import DTypeName, StrictModel


class ModelSection(StrictModel):
    """Which model; both applications read it, so write it once and refer to it (`&model`, `*model`)."""

    id: str = Field(min_length=1, description="Name of the model in the OpenAI API; without a colon.")
    path: str = Field(
        min_length=1,
        description="Folder of the Hugging Face checkpoint, the same on every node. A relative path is sought beside "
        "the config file, in the current folder and in the folder of serve_app.py.",
    )
    dtype: DTypeName = Field(
        default="bfloat16", description="What weights are held and computed in, on routers and shards alike."
    )

    @field_validator("id")
    @classmethod
    def _no_adapter(cls, value: str) -> str:
        if ":" in value:
            raise ValueError(
                f"{value!r} has a colon, behind which Ray Serve LLM reads the name of an adapter: no request for the "
                f"model would find it; take {value.replace(':', '-')!r}, say"
            )
        return value
