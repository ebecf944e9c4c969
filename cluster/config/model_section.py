"""The section `model`, which both applications read."""

from __future__ import annotations

from pydantic import Field, field_validator

from experts.protocol.settings import DTypeName, StrictModel


class ModelSection(StrictModel):
    """The model. Both applications read it, so write it once and refer to it (`&model`, `*model`)."""

    id: str = Field(min_length=1, description="Name of the model in the OpenAI API, without a colon.")
    path: str = Field(
        min_length=1,
        description="The checkpoint: a folder, the same on every node; a Hugging Face id, `org/name` or "
        "`org/name@revision` (a branch, tag or commit); or an `s3://` or `gs://` folder. A relative path is looked up "
        "beside the config file, in the current folder, and in the folder of serve_app.py; an id counts if no folder "
        "has that name. What is not a folder is fetched once a node, by each shard and router the files it needs.",
    )
    dtype: DTypeName = Field(
        default="bfloat16", description="Data type of weights and computation, on routers and shards alike."
    )
    mtp: bool = Field(
        default=False,
        description="Whether shards hold the experts of the checkpoint's layer for multi-token prediction (MTP) too. "
        "Routers with `speculative_config: {method: mtp, num_speculative_tokens: 1}` in their `engine_kwargs` need it; "
        "others may share the shards.",
    )

    @field_validator("id")
    @classmethod
    def _no_adapter(cls, value: str) -> str:
        if ":" in value:
            raise ValueError(
                f"{value!r} has a colon; Ray Serve LLM takes what follows it for an adapter's name, so that no request "
                f"would reach the model. Use another name, such as {value.replace(':', '-')!r}"
            )
        return value
