"""vLLM's weight loader without the routed experts, and the checks that all weights came and all layers are ours."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Generator
from typing import Any

import torch

from experts.checkpoint import CheckpointError
from experts.inductor_joint import keep_reads_behind_writes
from experts.protocol.errors import UnsupportedModelError
from experts.transports.device_memory import router_device_bytes
from experts.vllm_plugin.joints import (
    DefaultModelLoader,
    RoutedExperts,
    defaulted_parameters,
    gather_from_workers,
    guesses_by_mtp,
    is_draft,
    loaders_may_reserve,
    register_model_loader,
)
from experts.vllm_plugin.layer import MeshExpertsMixin, current_checkpoint, current_client, find_gates
from experts.vllm_plugin.load_record import LoadRecord
from experts.vllm_plugin.refusals import check_engine

logger = logging.getLogger(__name__)

LOAD_FORMAT = "expertmesh"
_NAMED = 5  # problems that an error names


def verify_model(model: torch.nn.Module, guesses: bool = False) -> int:
    """Check that every MoE layer was replaced and return how many; UnsupportedModelError names one that was not.

    `guesses`: it is not the engine's own model, but the MTP layer of it.
    """
    replaced = 0
    for name, module in model.named_modules():
        if isinstance(module, MeshExpertsMixin):
            replaced += 1
        elif isinstance(module, RoutedExperts) or _looks_like_experts(module):
            raise UnsupportedModelError(
                f"MoE layer {name} ({type(module).__name__}) was not replaced by expertmesh; this model class of vLLM "
                "brings its own experts, which is not supported yet"
            )
    if replaced == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts: a dense model gains nothing here, serve it with plain vLLM"
        )
    shape = current_client().shape
    expected = shape.num_draft_layers if guesses else shape.last_of_step + 1
    if replaced != expected:
        raise UnsupportedModelError(f"{replaced} MoE layers were replaced, the checkpoint has {expected}")
    return replaced


def _looks_like_experts(module: torch.nn.Module) -> bool:
    return any(name in ("w13_weight", "w2_weight") for name, _ in module.named_parameters(recurse=False))


def _bytes_to_leave(vllm_config: Any) -> int:
    settings = check_engine(vllm_config)
    spec = current_checkpoint(settings).spec
    row_bytes = spec.hidden_size * vllm_config.model_config.dtype.itemsize
    return router_device_bytes(settings, spec.top_k, row_bytes, spec.hidden_size)


@register_model_loader(LOAD_FORMAT)
class RouterModelLoader(DefaultModelLoader):
    """vLLM's loader without the tensors of routed experts, which a router neither reads nor holds.

    Tensors come from the files that the checkpoint's index names, as those of the shards do; vLLM's own iteration would
    read every file, and let the last one win.
    """

    def __init__(self, load_config: Any) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "safetensors"
        super().__init__(load_config)
        self.enable_weights_track = True  # vLLM then hands us what the model reports as loaded
        self._record: LoadRecord | None = None

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes of the GPU that vLLM must leave: what a router takes of it after the KV cache was sized.

        vLLM asks before it profiles. 0 where the user says how large the cache is.
        """
        settings, nbytes = check_engine(vllm_config), _bytes_to_leave(vllm_config)
        own_size = vllm_config.cache_config.kv_cache_memory_bytes
        logger.info(
            "pairs with up to %d shards and experts that no shard holds may take %.2f GB of this GPU, which %s",
            settings.reserve_for_shards,
            nbytes / 1e9,
            "kv_cache_memory_bytes has to leave" if own_size else "vLLM leaves for them",
        )
        return 0 if own_size else nbytes

    def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Load the dense half, then check that expertmesh replaced every MoE layer. A draft model is loaded whole.

        The MTP layer of the same checkpoint is no such model: it goes the way of the engine's own.
        """
        draft, by_mtp = is_draft(vllm_config, model_config), guesses_by_mtp(vllm_config)
        if draft and not by_mtp:
            load_config = copy.copy(self.load_config)
            load_config.load_format = "auto"
            return DefaultModelLoader(load_config).load_model(vllm_config, model_config, *args, **kwargs)
        self._checkpoint = current_checkpoint(check_engine(vllm_config))
        if not vllm_config.model_config.enforce_eager:
            keep_reads_behind_writes()
        if draft:
            model = super().load_model(vllm_config, model_config, *args, **kwargs)
            logger.info("guesses by MTP: replaced %d MoE layer", verify_model(model, guesses=True))
            return model
        if vllm_config.device_config.device_type == "cuda" and not loaders_may_reserve():
            logger.warning(
                "this vllm leaves no memory for pairs with shards: lower gpu_memory_utilization by the share that %.2f "
                "GB are of the GPU",
                _bytes_to_leave(vllm_config) / 1e9,
            )
        model = super().load_model(vllm_config, model_config, *args, **kwargs)
        count = verify_model(model)
        find_gates(model)
        num_params = sum(p.numel() for p in model.parameters())
        logger.info("replaced %d MoE layers; this router holds %d parameters", count, num_params)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load the dense half. CheckpointError names what the checkpoint lacks, and what does not fit the model."""
        if getattr(model, "secondary_weights", ()):
            raise UnsupportedModelError(f"{type(model).__name__} wants weights of a second folder: not supported")
        record = self._record = LoadRecord(model, defaulted_parameters(model))
        try:
            with record:
                super().load_weights(model, model_config)
        except (CheckpointError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not record.last:
                raise
            raise CheckpointError(f"{record.last} cannot be loaded into {type(model).__name__}: {error}") from error
        finally:
            self._record = None  # it holds the parameters, which vLLM may replace by others

    def track_weights_loading(
        self, model: torch.nn.Module, loaded_weights: set[str] | None, *args: Any, **kwargs: Any
    ) -> None:
        """In place of vLLM's check, which passes over linear layers: every parameter must have come, whole."""
        assert self._record is not None
        for taken in gather_from_workers(self._record.taken()):
            self._record.add_taken(taken)
        problems = self._record.problems(loaded_weights)
        if problems:
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise CheckpointError(f"{self._checkpoint.store.folder}: {'; '.join(problems[:_NAMED])}{more}")

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Every tensor of the checkpoint except those of routed experts, in the order of files and of bytes in them.

        vLLM's own iterator creates each tensor before we could skip it, which touches its pages: with read-ahead, most
        of the checkpoint.
        """
        strategy = self.load_config.safetensors_load_strategy
        if strategy not in (None, "lazy") or self.load_config.model_loader_extra_config:
            logger.warning("files are mapped and read when needed; safetensors_load_strategy is not heeded")
        store = self._checkpoint.store
        self.counter_before_loading_weights = getattr(self, "counter_before_loading_weights", 0) or time.perf_counter()
        names = [name for name in store.index.file_of if not self._checkpoint.owns(name)]
        for name in sorted(names, key=lambda name: (store.index.file_of[name], store.entry(name).start)):
            tensor = store.tensor(name)
            if self._record is not None:
                self._record.offer(name, str(store.index.path_of(name)), tensor)
            yield source.prefix + name, tensor
