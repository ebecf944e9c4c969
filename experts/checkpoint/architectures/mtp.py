"""The layer of a checkpoint that predicts one token further (multi-token prediction, MTP), where it has experts too.

It is stored beside the decoder layers and used only by a router that speculates with it. vLLM runs the first such
layer alone, whatever `num_speculative_tokens` says, so a checkpoint with more of them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.hf_config import ModelConfig


@dataclass(frozen=True)
class MtpNaming:
    """How an MTP layer is stored: as one more decoder layer, or under a `prefix` of its own as layer 0.

    `count` is the key of config.json for how many there are, and `if_absent` how many without the key.
    """

    count: str = "num_nextn_predict_layers"
    prefix: str | None = None
    if_absent: int = 0


# Of model types whose MTP layer has routed experts of the same number and size as the decoder layers.
MTP_LAYERS = {
    "deepseek_v3": MtpNaming(),
    "glm4_moe": MtpNaming(),
    "glm4_moe_lite": MtpNaming(),
    "qwen3_next": MtpNaming(prefix="mtp.", if_absent=1),
}


def mtp_layer_id(config: ModelConfig) -> int:
    """The number of the MTP layer among the decoder layers: the one after the last."""
    return config.int_of("num_hidden_layers", "n_layers")


def mtp_aside(config: ModelConfig) -> tuple[int, str] | None:
    """Number and prefix of an MTP layer that is stored apart from the decoder layers; None for others, and for none."""
    naming = MTP_LAYERS.get(config.model_type)
    return None if naming is None or naming.prefix is None else (mtp_layer_id(config), naming.prefix)


def check_mtp(config: ModelConfig) -> None:
    """CheckpointError unless this checkpoint has one MTP layer, and it is known where its experts are."""
    naming = MTP_LAYERS.get(config.model_type)
    if naming is None:
        raise CheckpointError(
            f"{config.path}: where the experts of an MTP layer of {config.model_type!r} are is not known, expected one "
            f"of {', '.join(sorted(MTP_LAYERS))}; set model.mtp to false"
        )
    count = config.get(naming.count, naming.if_absent)
    if count != 1:
        raise CheckpointError(
            f"{config.path}: {naming.count} is {count!r}, expected 1 MTP layer, which is what vLLM runs; set model.mtp "
            "to false"
        )
