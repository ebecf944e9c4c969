"""Named by `worker_extension_cls`: importing it registers the plug-in, its class adds the calls that reach a worker.

vLLM imports this module in each worker before the model is built, and only for engines that ask for it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Generator
from typing import Any

import torch
from safetensors import safe_open

from experts.membership import Membership, ShardEndpoint
from experts.vllm_adapter import DefaultModelLoader, register_model_loader, weight_files
from experts.vllm_plugin import check_engine, current_checkpoint, current_router, register, verify_model

logger = logging.getLogger(__name__)

LOAD_FORMAT = "expertmesh"

register()


@register_model_loader(LOAD_FORMAT)
class RouterModelLoader(DefaultModelLoader):
    """vLLM's loader without the tensors of routed experts, which a router neither reads nor holds."""

    def __init__(self, load_config: Any) -> None:
        load_config = copy.copy(load_config)
        load_config.load_format = "safetensors"
        super().__init__(load_config)

    def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Load the dense half, then make sure that nothing was left that expertmesh does not serve."""
        self._checkpoint = current_checkpoint(check_engine(vllm_config))
        model = super().load_model(vllm_config, model_config, *args, **kwargs)
        count = verify_model(model)
        num_params = sum(p.numel() for p in model.parameters())
        logger.info("replaced %d MoE layers; this router holds %d parameters", count, num_params)
        return model

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Every tensor of the checkpoint but those of routed experts.

        vLLM's own iterator would have each tensor made before it is passed over, which touches its pages: with
        read-ahead that is most of the checkpoint.
        """
        strategy = self.load_config.safetensors_load_strategy
        if strategy not in (None, "lazy") or self.load_config.model_loader_extra_config:
            logger.warning("the whole checkpoint is read, experts too: the load strategy is not vLLM's own")
            for name, tensor in super()._get_weights_iterator(source):
                if not self._checkpoint.owns(name.removeprefix(source.prefix)):
                    yield name, tensor
            return
        files = weight_files(self, source)
        self.counter_before_loading_weights = getattr(self, "counter_before_loading_weights", 0) or time.perf_counter()
        for file in sorted(files):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    if not self._checkpoint.owns(name):
                        yield source.prefix + name, tensors.get_tensor(name)


class ExpertMeshWorker:
    """Mixed into vLLM's worker; `collective_rpc` reaches these methods between steps."""

    def expertmesh_connect_ahead(self, endpoints: list[dict[str, Any] | None]) -> list[int]:
        """Begin to connect to an epoch's new shards; see `MeshRouter.connect_ahead`."""
        return current_router().connect_ahead(None if e is None else ShardEndpoint(**e) for e in endpoints)

    def expertmesh_apply_membership(self, membership: dict[str, Any], wait_s: float | None = None) -> dict[str, Any]:
        """Switch to an epoch; see `MeshRouter.apply_membership`."""
        verify_model(self.model_runner.get_model())  # type: ignore[attr-defined]
        return current_router().apply_membership(Membership.from_dict(membership), wait_s)

    def expertmesh_status(self) -> dict[str, Any]:
        """Counters and membership of this router, and what it holds."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        return {
            **current_router().status(),
            "params": sum(p.numel() for p in model.parameters()),
            "resident_bytes": _resident_bytes(),
        }

    def expertmesh_trace(self) -> bytes:
        """The sampled routing decisions as the bytes of an .npz file; none if nothing was recorded."""
        return current_router().recorder.to_bytes()

    def expertmesh_clear_trace(self) -> None:
        """Forget the sampled decisions and begin anew."""
        current_router().recorder.clear()


def _resident_bytes() -> int:
    """Anonymous memory of this process; pages of mapped files are not its own."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
