"""What sizing knows of a model: its tensors, its attention, its experts.

D hidden size, I expert width, E experts of a layer, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Side = Literal["router", "experts", "unused"]
Basis = Literal["headers", "config", "measured", "estimated", "nominal", "given"]

SERVED_BYTES = 2  # of a float: services run in 16 bits


class Quantized(Protocol):
    """How a checkpoint stores quantized matrices; `experts.checkpoint.quantization` has them."""

    @property
    def name(self) -> str: ...

    def matrix_bytes(self, rows: int, columns: int, float_bytes: int) -> int:
        """Bytes of one matrix with its scales, of which those in the model's dtype take `float_bytes` each."""
        ...


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores weights.

    Attributes:
        quantized: of routed experts; None: all are floats.
        float_bytes: of a float.
        dense: whether attention and dense layers are quantized too.
        kept: whether shards keep experts as they are stored; else they hold floats.
    """

    quantized: Quantized | None = None
    float_bytes: int = 2
    dense: bool = False
    kept: bool = True

    @property
    def form(self) -> str | None:
        """The format's name, None for floats."""
        return None if self.quantized is None else self.quantized.name


@dataclass(frozen=True)
class Tensors:
    """`count` equal tensors of `rows` x `columns` (1 for vectors), a part of the model with a name for people.

    `kind` says what quantization spares: nothing of an expert's matrices, some of the linear layers, all of the rest.
    """

    part: str
    side: Side
    rows: int
    columns: int = 1
    count: int = 1
    kind: Literal["expert", "linear", "other"] = "other"

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.count

    def nbytes(self, stored: Stored) -> int:
        """Bytes in a checkpoint that stores weights so."""
        quantized = self.kind == "expert" or (stored.dense and self.kind == "linear")
        if stored.quantized is not None and quantized and self.columns > 1:
            return self.count * stored.quantized.matrix_bytes(self.rows, self.columns, stored.float_bytes)
        return self.parameters * stored.float_bytes


@dataclass(frozen=True)
class AttentionGroup:
    """Decoder layers with the same attention.

    Attributes:
        kind: mha, gqa, mqa, mla, or mla+indexer (DeepSeek's sparse attention, whose index has a cache of its own).
        layers: how many.
        token_values: values that one token takes in one layer's KV cache.
        index_bytes: bytes of it beside that, whatever the cache's dtype: fp8 keys of an indexer with their scale.
        window: tokens of a sliding window or a chunk of local attention; None for full attention.
        flops: floating-point operations for one query token and one cached token in one layer, while it decodes.
        prefill_flops: likewise for a prompt's tokens, which MLA computes outside its latent space.
        reads_at_most: cached tokens that a query token attends to at most, where an indexer picks them.
        heads: of queries.
        kv_heads: among which a token's values are divided; 1 where all of them serve every head (MLA).
    """

    kind: str
    layers: int
    token_values: int
    flops: float
    prefill_flops: float
    index_bytes: int = 0
    window: int | None = None
    reads_at_most: int | None = None
    heads: int = 1
    kv_heads: int = 1

    def token_bytes(self, value_bytes: float, workers: int = 1) -> float:
        """Bytes of one token in one layer's cache, at each of the workers of a router.

        They divide the KV heads. Where there are fewer than workers, several workers hold the same one.
        """
        return self.token_values * value_bytes / min(workers, self.kv_heads) + self.index_bytes

    def cached(self, tokens: float) -> float:
        """Tokens of a sequence that a query token may attend to."""
        return tokens if self.window is None else min(tokens, self.window)

    def read(self, tokens: float) -> float:
        """Tokens of a sequence that one query token attends to."""
        cached = self.cached(tokens)
        return cached if self.reads_at_most is None else min(cached, self.reads_at_most)


@dataclass(frozen=True)
class ModelFacts:
    """A model as config.json, or config.json and the headers of its files, tell it.

    Attributes:
        name: for people.
        model_type: as in config.json.
        tensors: what the architecture has, whatever the files hold.
        stored: how the files store it.
        attention: the decoder layers by attention.
        max_positions: longest context in tokens, None if config.json does not say.
        header_bytes: bytes by (part, side) from the files' headers; None if only config.json is at hand.
        mtp_router_bytes: what a router holds of the layer for multi-token prediction, whose routed experts are one more
            layer of shards; None if that layer is not served.
        served: whether this project has a loader for the model; a reason if not.
        notes: what is not certain.
    """

    name: str
    model_type: str
    num_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    vocab_size: int
    tensors: tuple[Tensors, ...]
    stored: Stored
    attention: tuple[AttentionGroup, ...]
    max_positions: int | None = None
    header_bytes: tuple[tuple[str, Side, int], ...] | None = None
    absorbed_values: int = 0
    mtp_router_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def expert_layers(self) -> int:
        """Layers of experts that shards hold."""
        return self.moe_layers + (self.mtp_router_bytes is not None)

    @property
    def basis(self) -> Basis:
        """Where the bytes of weights come from."""
        return "config" if self.header_bytes is None else "headers"

    def parameters(self, *sides: Side) -> int:
        """Parameters of the sides, by default of both halves."""
        return sum(each.parameters for each in self.tensors if each.side in (sides or ("router", "experts")))

    def parts(self) -> list[tuple[str, Side, int]]:
        """(part, side, bytes) as stored, the largest first."""
        if self.header_bytes is not None:
            found = list(self.header_bytes)
        else:
            total: dict[tuple[str, Side], int] = {}
            for each in self.tensors:
                key = (each.part, each.side)
                total[key] = total.get(key, 0) + each.nbytes(self.stored)
            found = [(part, side, nbytes) for (part, side), nbytes in total.items()]
        return sorted(found, key=lambda each: -each[2])

    def weight_bytes(self, side: Side) -> int:
        """Bytes of one side as stored."""
        return sum(nbytes for _, of, nbytes in self.parts() if of == side)

    def held_bytes(self, side: Side) -> int:
        """Bytes of one side in a GPU's memory: floats in the 16 bits of the service, and so experts whose format no
        kernel keeps; other quantized weights as stored.
        """
        if self.stored.form is not None and (side != "experts" or self.stored.kept):
            return self.weight_bytes(side)
        known = {each.part for each in self.tensors}
        beside = sum(nbytes for part, of, nbytes in self.parts() if of == side and part not in known)
        return SERVED_BYTES * self.parameters(side) + beside

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer as a shard holds it, rounded up."""
        return math.ceil(self.held_bytes("experts") / (self.moe_layers * self.num_experts))

    @property
    def engine_expert_bytes(self) -> int:
        """The same in vLLM's own engine, which has a kernel for each format that is read."""
        if self.stored.kept:
            return self.expert_bytes
        return math.ceil(self.weight_bytes("experts") / (self.moe_layers * self.num_experts))

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of one layer."""
        return self.parameters("experts") // (self.moe_layers * self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with; the embedding is a look-up."""
        embedding = sum(each.parameters for each in self.tensors if each.part == "embedding")
        tied = not any(each.part == "output head" for each in self.tensors)
        dense = self.parameters("router") - (0 if tied else embedding)
        return dense + self.moe_layers * self.top_k * self.expert_parameters

    @property
    def kinds(self) -> str:
        """The attention for people: `gqa (18 layers), gqa in a window of 128 (18 layers)`."""
        return ", ".join(
            f"{group.kind}{f' in a window of {group.window}' if group.window else ''} ({group.layers} layers)"
            for group in self.attention
        )

    def kv_token_bytes(self, value_bytes: float = 2.0) -> float:
        """Bytes that one more token of a sequence takes in all layers, while it is inside every window."""
        return sum(group.layers * group.token_bytes(value_bytes) for group in self.attention)

    def kv_sequence_bytes(
        self, tokens: int, value_bytes: float = 2.0, block: int = 16, in_flight: int = 0, workers: int = 1
    ) -> float:
        """Bytes of one sequence of `tokens` tokens in vLLM's paged cache, in blocks of `block` tokens, at each worker.

        A window keeps its last tokens and the `in_flight` ones of a step, in one block more than they fill, since it
        need not begin at a block's start (vLLM's SlidingWindowSpec).
        """
        total = 0.0
        for group in self.attention:
            blocks = math.ceil(tokens / block)
            if group.window is not None:
                blocks = min(blocks, math.ceil(min(group.window - 1 + in_flight, tokens) / block) + 1)
            total += group.layers * blocks * block * group.token_bytes(value_bytes, workers)
        return total


def attention_by_layer(layers: Iterable[AttentionGroup]) -> tuple[AttentionGroup, ...]:
    """One group for each kind of layer, from one group for each layer, in the order of their first layers."""
    counted: dict[AttentionGroup, int] = {}
    for one in layers:
        kind = replace(one, layers=0)
        counted[kind] = counted.get(kind, 0) + one.layers
    return tuple(replace(kind, layers=count) for kind, count in counted.items())
