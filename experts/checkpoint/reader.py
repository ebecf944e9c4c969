"""Reads one expert at a time from a Hugging Face checkpoint, touching only that expert's bytes.

Legend: D hidden size, I expert intermediate size.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.checkpoint.architectures.mtp import check_mtp, mtp_aside, mtp_layer_id
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.families import activation_of, family_of
from experts.checkpoint.fingerprint import Fingerprint, fingerprint_of
from experts.checkpoint.hf_config import AGREED_KEYS, ModelConfig
from experts.checkpoint.layout import Part, Role
from experts.checkpoint.quantization.scheme import Scheme
from experts.checkpoint.safetensors_file import TensorStore
from experts.checkpoint.sources.opening import open_source
from experts.checkpoint.storage import ExpertRange, ExpertStorage, find_layout
from experts.checkpoint.weight_format import QuantizedExpert, WeightFormat
from experts.model.spec import ExpertSpec, ExpertWeights

if TYPE_CHECKING:
    import torch


class ExpertCheckpoint:
    """The routed experts of a checkpoint folder. Create it with `open`; safe to use from several threads."""

    def __init__(self, spec: ExpertSpec, storage: ExpertStorage, scheme: Scheme | None, config: ModelConfig) -> None:
        self.spec = spec
        self.scheme = scheme
        """How quantized matrices are stored, None if config.json names no quantization."""
        self.store = storage.store
        self._config = config
        self._storage = storage
        self._parts = {part.role: part for part in storage.layout.parts}
        self._fingerprint: concurrent.futures.Future[Fingerprint] | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], mtp: bool = False) -> ExpertCheckpoint:
        """Read config.json and the index or header, but no weights. `path` is a folder or another name of a model.

        `mtp`: the experts of the layer for multi-token prediction too, as the last layer.
        CheckpointError names the missing file, key or tensor, or the unsupported quantization.
        """
        source = open_source(path).resolved()
        folder = source.fetch(source.facts())
        config = ModelConfig(folder)
        family = family_of(config)
        layer_ids = tuple(family.moe_layers(config))
        if not layer_ids:
            raise CheckpointError(f"{config.path}: no layer of this {config.model_type} has routed experts")
        if mtp:
            check_mtp(config)
        scheme = config.scheme()
        store = TensorStore(folder, source)
        layout, prefix = find_layout(store, family.layouts, layer_ids[0])
        spec = ExpertSpec(
            model_type=config.model_type,
            layer_ids=(*layer_ids, mtp_layer_id(config)) if mtp else layer_ids,
            num_experts=config.int_of(*family.num_experts),
            top_k=config.int_of(*family.top_k),
            hidden_size=config.int_of(*family.hidden_size),
            intermediate_size=config.int_of(*family.intermediate_size),
            activation=activation_of(family, config),
            has_bias=layout.has_bias,
            weight_on_input=family.weight_on_input,
            quantization=None if scheme is None else scheme.name,
            num_mtp_layers=int(mtp),
        )
        if spec.top_k > spec.num_experts:
            raise CheckpointError(
                f"{config.path}: top-{spec.top_k} of {spec.num_experts} experts, expected at most {spec.num_experts}"
            )
        storage = ExpertStorage(store, layout, prefix, spec.num_experts, scheme, mtp_aside(config))
        return cls(spec, storage, scheme, config)

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json says that routers and shards must agree on, as plain JSON values by name."""
        spec = self.spec
        return {
            "model type": spec.model_type,
            "decoder layers with experts": list(spec.layer_ids),
            "experts in a layer": spec.num_experts,
            "experts for a token": spec.top_k,
            "hidden size": spec.hidden_size,
            "expert width": spec.intermediate_size,
            "activation": [spec.activation.kind, spec.activation.alpha, spec.activation.limit],
            "biases": spec.has_bias,
            "router weight on the input": spec.weight_on_input,
            "quantization": spec.quantization,
            **{f"config.json's {key}": self._config.get(key) for key in AGREED_KEYS},
        }

    def start_fingerprint(self) -> concurrent.futures.Future[Fingerprint]:
        """The hashes of all tensors, made in the background once; CheckpointError as its result names a broken file."""
        with self._lock:
            if self._fingerprint is None:
                self._fingerprint = concurrent.futures.Future()
                threading.Thread(target=self._make_fingerprint, name="fingerprint", daemon=True).start()
            return self._fingerprint

    def _make_fingerprint(self) -> None:
        assert self._fingerprint is not None
        try:
            self._fingerprint.set_result(fingerprint_of(self.store))
        except Exception as error:
            self._fingerprint.set_exception(error)

    @property
    def remote(self) -> bool:
        """Whether files are fetched when first needed, so that some may not be here yet."""
        return self.store.source.remote

    def fetch_experts(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Have the files with these experts, (layer, expert) as in `read_expert`, in the folder, and no others.

        CheckpointError names a tensor that is missing, or a file that cannot be had.
        """
        if self.remote:
            layer_ids, parts = self.spec.layer_ids, self._parts.values()
            names = {
                name
                for layer, expert in wanted
                for part in parts
                for name in self._storage.names(part, layer_ids[layer], expert)
            }
            self.store.fetch(names)

    def fetch_rest(self) -> Path:
        """The folder, with what a router needs in it: files with a tensor that is no expert's, config, tokenizer."""
        store = self.store
        if self.remote:
            store.fetch(name for name in store.index.file_of if not self.owns(name))
            store.source.fetch(store.source.other_files())
        return store.folder

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert (the first) in the files, scales included."""
        return sum(r.nbytes for part in self._parts.values() for r in self._ranges(part, 0, 0))

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
        """One expert as contiguous CPU tensors of `dtype` (float32, bfloat16 or float16), dequantized.

        `layer` is a row of the placement: the `layer`-th MoE layer. A tensor that is stored in this dtype and layout
        shares the file's mapping: never write to it. Raises CheckpointError for a tensor that is missing or has an
        unexpected shape or dtype.
        """
        import torch  # here, since whoever plans a placement reads the spec and no weights

        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if dtype not in dtypes:
            raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, dtypes))}")
        self._check_place(layer, expert)
        has_bias = self.spec.has_bias
        return ExpertWeights(
            w13_2ID=self._gate_up(layer, expert, dtype),
            w2_DI=_packed([self._read("down", layer, expert, dtype)], dtype),
            b13_2I=_packed(self._halves("gate_up_bias", layer, expert, dtype), dtype) if has_bias else None,
            b2_D=_packed([self._read("down_bias", layer, expert, dtype)], dtype) if has_bias else None,
        )

    @functools.cached_property
    def weight_format(self) -> WeightFormat | None:
        """The format of `read_quantized`, None unless kernels keep what every expert of every layer is stored in.

        Reads headers only. Of experts whose files are not here, the names of their tensors tell it.
        """
        form, spec = None if self.scheme is None else self.scheme.kept, self.spec
        matrices = [part for part in self._parts.values() if not part.role.endswith("_bias")]
        if form is None or (form.name == "fp8_block" and any(part.transposed for part in matrices)):
            return None
        if form.name == "fp8_block" and "gate_up" in self._parts and spec.intermediate_size % form.group:
            return None  # some block has rows of both gate and up
        quantized = all(
            self._storage.is_quantized(part, self._shape(part), spec.layer_ids[layer], expert)
            for layer in range(spec.num_layers)
            for part in matrices
            for expert in self._apart(part)
        )
        return form if quantized else None

    def read_quantized(self, layer: int, expert: int) -> QuantizedExpert:
        """One expert as stored; tensors that need no concatenation are views of the file.

        Raises CheckpointError as `read_expert` does, and if `weight_format` is None.
        """
        import torch

        form = self.weight_format
        if form is None:
            raise CheckpointError(
                f"the experts of this {self.spec.model_type} are not all stored quantized as kernels keep them; "
                "use read_expert"
            )
        self._check_place(layer, expert)

        def read(role: Role) -> tuple[torch.Tensor, torch.Tensor]:
            part = self._parts[role]
            return self._storage.read_quantized(part, self._shape(part), self.spec.layer_ids[layer], expert)

        if "gate_up" not in self._parts:
            w13, w13_scale = (torch.cat(pieces) for pieces in zip(read("gate"), read("up"), strict=True))
        elif self._parts["gate_up"].interleaved:
            w13, w13_scale = (torch.cat([rows[0::2], rows[1::2]]) for rows in read("gate_up"))
        else:
            w13, w13_scale = read("gate_up")
        w2, w2_scale = read("down")
        has_bias, biases = self.spec.has_bias, torch.float32
        return QuantizedExpert(
            form,
            w13_2IB=w13,
            w13_scale=w13_scale if w13_scale.dtype == torch.uint8 else w13_scale.float(),
            w2_DB=w2,
            w2_scale=w2_scale if w2_scale.dtype == torch.uint8 else w2_scale.float(),
            b13_2I=_packed(self._halves("gate_up_bias", layer, expert, biases), biases) if has_bias else None,
            b2_D=_packed([self._read("down_bias", layer, expert, biases)], biases) if has_bias else None,
        )

    def owns(self, name: str) -> bool:
        """Whether a tensor (weights, biases, scales) belongs to a routed expert; routers do not load those."""
        return self._storage.owns(name)

    def check(self, *, only_here: bool = False) -> None:
        """Check that every expert's tensors exist with the right shape and dtype, and that every tensor is in the file
        that the index names. Reads headers only; with `only_here`, files that are not in the folder are passed over.

        Of a model that is fetched, files that are not here yet are passed over too. CheckpointError names the first
        tensor that does not, and its file.
        """
        only_here = only_here or self.remote
        for layer, layer_id in enumerate(self.spec.layer_ids):
            for part in self._parts.values():
                for expert in self._apart(part):
                    if not only_here or self._storage.is_here(part, layer_id, expert):
                        self._ranges(part, layer, expert)
        self.store.check_index()

    def _apart(self, part: Part) -> range:
        """Experts that have a tensor each; the first stands for all that share one."""
        return range(self.spec.num_experts if part.stack == "none" else 1)

    def _check_place(self, layer: int, expert: int) -> None:
        for what, value, bound in (("layer", layer, self.spec.num_layers), ("expert", expert, self.spec.num_experts)):
            if not 0 <= value < bound:
                raise ValueError(f"{what} is {value}, expected 0..{bound - 1}")

    def _shape(self, part: Part) -> tuple[int, ...]:
        return part.shape(self.spec.hidden_size, self.spec.intermediate_size)

    def _ranges(self, part: Part, layer: int, expert: int) -> list[ExpertRange]:
        return self._storage.ranges(part, self._shape(part), self.spec.layer_ids[layer], expert)

    def _read(self, role: Role, layer: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
        part = self._parts[role]
        return self._storage.read(part, self._shape(part), self.spec.layer_ids[layer], expert, dtype)

    def _halves(self, role: Role, layer: int, expert: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Gate and up from a part that holds both, or the whole part if up already follows gate."""
        whole = self._read(role, layer, expert, dtype)
        return [whole[0::2], whole[1::2]] if self._parts[role].interleaved else [whole]

    def _gate_up(self, layer: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
        if "gate_up" in self._parts:
            return _packed(self._halves("gate_up", layer, expert, dtype), dtype)
        joined = self._adjacent(self._parts["gate"], self._parts["up"], layer, expert)
        if joined is not None and joined.entry.dtype == dtype:
            return self._storage.read_range(joined)
        return _packed([self._read(role, layer, expert, dtype) for role in ("gate", "up")], dtype)

    def _adjacent(self, gate: Part, up: Part, layer: int, expert: int) -> ExpertRange | None:
        """Gate and up as one range if up directly follows gate in the file, as it often does; else None."""
        first, second = self._ranges(gate, layer, expert), self._ranges(up, layer, expert)
        if len(first) > 1 or len(second) > 1 or gate.transposed or first[0].entry.dtype != second[0].entry.dtype:
            return None
        if first[0].entry.file != second[0].entry.file or first[0].start + first[0].nbytes != second[0].start:
            return None
        rows, columns = first[0].shape
        return ExpertRange(first[0].entry, first[0].start, 2 * first[0].nbytes, (2 * rows, columns))


def _packed(pieces: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The pieces concatenated into a contiguous tensor of `dtype`; no copy of a single piece that is one already."""
    import torch

    if len(pieces) == 1 and pieces[0].dtype == dtype and pieces[0].is_contiguous():
        return pieces[0]
    out = torch.empty((sum(len(p) for p in pieces), *pieces[0].shape[1:]), dtype=dtype)
    row = 0
    for piece in pieces:
        out[row : row + len(piece)].copy_(piece)
        row += len(piece)
    return out


def fetch_rest(model: str) -> Path:
    """The folder with what a router needs of a model; see `ExpertCheckpoint.fetch_rest`. A folder is as it is."""
    source = open_source(model)
    return ExpertCheckpoint.open(model).fetch_rest() if source.remote else source.fetch([])
