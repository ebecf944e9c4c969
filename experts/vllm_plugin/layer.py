"""The layer that replaces vLLM's routed experts: it holds no weights and asks the shards.

Legend: T tokens, K top-k, D hidden size.

    router (attention, gate, top-k) -> forward_modular -> begin: rows go out to the shards
                                                          shared experts run here meanwhile
                                                       -> finish: weighted sums come back

`begin` and `finish` are opaque ops for torch.compile, which may move what nothing depends on, and give away a buffer
that nobody reads any more. So both are declared to write x, which they only read: shared experts, which read x, stay
between them, and the rows are intact for as long as they may have to be repeated. On GPUs vLLM wraps the whole layer in
an op of its own, where CUDA graphs must split.

With tensor parallelism every worker's layer gets all rows and the same top-k, and vLLM adds up what the workers return,
routed and shared together. So each worker dispatches its share of the rows over links of its own, and returns zeros in
the others.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.mesh_client import MeshClient
from experts.dispatch.pending import Pending
from experts.dispatch.rows.pregate import PreGate
from experts.dispatch.workers.refusal_board import make_board
from experts.dispatch.workers.row_share import RowShare
from experts.kernels.emulation import log_advice
from experts.model.spec import ExpertSpec
from experts.protocol.errors import UnsupportedModelError
from experts.protocol.settings import RouterSettings
from experts.transports.devices import with_index
from experts.vllm_plugin.joints import (
    FusedMoEMethodBase,
    RoutedExperts,
    SharedExpertsOrder,
    direct_register_custom_op,
    extract_layer_index,
    gather_from_workers,
    get_current_vllm_config,
    guesses_by_mtp,
    longest_step_s,
    most_rows_of_a_step,
    most_rows_while_generating,
    op_registry_oot,
    output_of,
    report_refused,
    routed_expert_classes,
    rows_of_prompts,
    step_in_progress,
    watch_traced_steps,
)
from experts.vllm_plugin.pooling.steps import pools, report_refused_prompts
from experts.vllm_plugin.refusals import check_draft, check_engine, check_layer, split_graphs

logger = logging.getLogger(__name__)


@dataclass
class EngineState:
    """What this process' one engine shares among its MoE layers, filled while the model is built."""

    settings: RouterSettings | None = None
    checkpoint: ExpertCheckpoint | None = None
    client: MeshClient | None = None
    pregate: PreGate | None = None
    """Set when the model is loaded."""
    pending: Pending | None = None
    """The layer between its `begin` and its `finish`."""
    rows_while_generating: int = 1
    """What a request may have in a step while it generates."""
    replaced: set[int] = field(default_factory=set)
    """Layers that are built. Once they are all of the engine's own model, a further one is of what guesses tokens."""


_engine = EngineState()


def current_client() -> MeshClient:
    """The client of this process' engine. RuntimeError when no MoE layer was built."""
    if _engine.client is None:
        raise RuntimeError("this engine has no MoE layer that expertmesh replaced")
    return _engine.client


def current_checkpoint(settings: RouterSettings) -> ExpertCheckpoint:
    """The experts' checkpoint, opened once. UnsupportedModelError with the reader's reason, or for a second engine."""
    if _engine.checkpoint is None:
        try:
            checkpoint = ExpertCheckpoint.open(settings.model_path, settings.mtp)
            checkpoint.check()
        except CheckpointError as error:
            raise UnsupportedModelError(f"the experts of this model cannot be served apart: {error}") from error
        _engine.checkpoint, _engine.settings = checkpoint, settings
    if settings != _engine.settings:
        raise UnsupportedModelError(
            f"this process has an engine for the experts of {_engine.settings and _engine.settings.model_path} "
            f"already; one with other settings ({settings.model_path}) needs a process of its own"
        )
    return _engine.checkpoint


def _share_of(moe_config: Any, config: Any) -> RowShare | None:
    """This worker's part of the rows, None for an engine of one worker. All workers call it at the same time."""
    worker, num_workers = moe_config.moe_parallel_config.tp_rank, moe_config.tp_size
    if num_workers == 1:
        return None
    board = make_board(worker, num_workers, most_rows_of_a_step(config), longest_step_s(), gather_from_workers)
    return RowShare(worker, num_workers, board)


def _mesh_layer(prefix: str, config: Any, spec: ExpertSpec) -> int:
    """Which layer of the shards the layer `prefix` of the engine is; UnsupportedModelError if it is none."""
    if check_draft(prefix, config, len(_engine.replaced), spec.num_decoder_layers):
        return spec.num_decoder_layers
    layer_ids = spec.layer_ids[: spec.num_decoder_layers]
    layer_id = extract_layer_index(prefix)
    if layer_id not in layer_ids:
        raise UnsupportedModelError(
            f"{prefix} is a MoE layer that the checkpoint's list of MoE layers {layer_ids} lacks"
        )
    return layer_ids.index(layer_id)


class NoLocalWeights(FusedMoEMethodBase):
    """A MoE method without parameters, so that the loader has nothing to fill."""

    def create_weights(self, layer: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Create nothing: the weights live on shards."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack nothing."""

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: shards handle quantization."""
        return None

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size: int, *args: Any, **kwargs: Any) -> Any:
        """No local kernel, so no padding for one."""
        return hidden_size, intermediate_size

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """True: forward_modular runs shared experts between sending and receiving."""
        return True

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never called: forward_modular is replaced."""
        raise AssertionError("routed experts are computed by shards")


class MeshExpertsMixin:
    """What a replaced expert layer does: hold nothing, dispatch, combine."""

    layer_name: str
    top_k: int
    global_num_experts: int
    mesh_layer: int

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        """Called by RoutedExperts.__init__; checks the engine and the model, and makes the process' client once."""
        config = get_current_vllm_config()
        settings = check_engine(config)
        check_layer(prefix, moe_config, config)
        checkpoint = current_checkpoint(settings)
        self.mesh_layer = _mesh_layer(prefix, config, checkpoint.spec)
        _engine.replaced.add(self.mesh_layer)
        _engine.rows_while_generating = most_rows_while_generating(config)
        if _engine.client is None:
            device = with_index(str(config.device_config.device_type))
            split_graphs(config, device)
            shape = LayerShape(
                num_layers=checkpoint.spec.num_layers,
                num_experts=moe_config.num_experts,
                top_k=moe_config.experts_per_token,
                hidden_size=moe_config.hidden_dim,
                dtype=moe_config.in_dtype,
                num_draft_layers=checkpoint.spec.num_mtp_layers,
            )
            log_advice(shape.dtype, device)
            share = _share_of(moe_config, config)
            client = _engine.client = MeshClient(
                settings, checkpoint, shape, device, share=share, guesses=guesses_by_mtp(config)
            )
            report = report_refused_prompts if pools(config) else report_refused
            report(config, client.dispatcher.take_refused, client.dispatcher.stats.add_refused_requests)
            if settings.tracing is not None:
                watch_traced_steps(config, client.start_traced_step, client.end_traced_step)
        return NoLocalWeights(moe_config)

    def load_weights(self, weights: Any) -> Any:
        """Report expert tensors as loaded without reading them; our loader sends none."""
        for name, _ in weights:
            yield name

    def weight_loader(self, *args: Any, **kwargs: Any) -> bool:
        """Nothing to load."""
        return True

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, D], topk_* [T, K] -> weighted sum over each token's experts [T, D]."""
        # An op must not be told to write one tensor twice.
        other = None if shared_experts_input is x else shared_experts_input
        y = torch.ops.expertmesh.begin(x, topk_weights, topk_ids, self.mesh_layer, other)
        shared = None
        if shared_experts is not None and shared_experts_input is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
            shared = output_of(shared_experts)
        torch.ops.expertmesh.finish(y, x, topk_weights, topk_ids, shared)
        return y


def find_gates(model: torch.nn.Module) -> None:
    """Note where the gates of a loaded model are, for shards that would know what the next layer needs."""
    shape = current_client().shape
    layers = {name: each.mesh_layer for name, each in model.named_modules() if isinstance(each, MeshExpertsMixin)}
    rows_TD = torch.zeros(1, shape.hidden_size, dtype=shape.dtype, device=next(model.parameters()).device)
    _engine.pregate = PreGate.of(model, layers, shape.num_experts, shape.top_k, rows_TD)


def _begin(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer: int, shared_x: torch.Tensor | None
) -> torch.Tensor:
    client = current_client()
    if not client.attached:
        client.attach_static()
        if not client.attached:
            # Profiling and warm-up before the first epoch; requests are let in only after it.
            _engine.pending = None
            return torch.zeros_like(x)
    of_requests, padding_T = step_in_progress()
    if padding_T is not None:
        # Rows without an expert are neither sent nor recorded.
        topk_ids = topk_ids.masked_fill(padding_T[: len(topk_ids), None], -1)
    if layer == 0 and of_requests and client.recorder.wants_phases:
        client.recorder.begin_step(rows_of_prompts(len(topk_ids), _engine.rows_while_generating))
    mover = client.dispatcher.mover
    if mover.wants_hints and _engine.pregate is not None:
        mover.hint(_engine.pregate.words(layer, x))
    pending = client.begin(layer, x, topk_weights, topk_ids, record=of_requests)
    _engine.pending = pending
    return pending.y_TD if pending.y_TD.device == x.device else torch.empty_like(x)


def _begin_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer: int, shared_x: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _finish(
    y: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: torch.Tensor | None,
) -> None:
    pending, _engine.pending = _engine.pending, None
    if pending is None:
        return
    current_client().finish(pending)
    if pending.y_TD.data_ptr() != y.data_ptr():
        # torch.compile may pass a copy of what begin returned, or y is on a device and the rows are in host memory.
        y.copy_(pending.y_TD)


def _finish_fake(
    y: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: torch.Tensor | None,
) -> None:
    return None


def register() -> None:
    """Replace vLLM's routed experts in this process, through its out-of-tree registry. Idempotent."""
    if not hasattr(torch.ops.expertmesh, "begin"):
        for name, function, fake, written in (
            ("begin", _begin, _begin_fake, ["x", "shared_x"]),
            ("finish", _finish, _finish_fake, ["y", "x"]),
        ):
            direct_register_custom_op(
                op_name=name, op_func=function, mutates_args=written, fake_impl=fake, target_lib=_LIBRARY
            )
    for base in routed_expert_classes():
        if base.__name__ not in op_registry_oot:
            replacement = type(f"Mesh{base.__name__}", (MeshExpertsMixin, base), {})
            RoutedExperts.register_oot(replacement, name=base.__name__)


_LIBRARY = torch.library.Library("expertmesh", "FRAGMENT")
