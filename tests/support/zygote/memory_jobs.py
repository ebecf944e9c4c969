"""A job of `engine_zygote`: how much memory of a GPU vLLM would leave for what a router allocates later."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any


def reserved(emit: Any, model: str, settings: dict[str, Any], engine_kwargs: dict[str, Any], gpu_bytes: int) -> None:
    """What our loader asks vLLM to leave, and what vLLM's own functions make of it on a GPU of `gpu_bytes`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker import gpu_worker

    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs
    from experts.vllm_plugin.joints import loaders_may_reserve

    kwargs = {"model": model, "dtype": "bfloat16", "skip_tokenizer_init": True, **engine_kwargs}
    router = RouterSettings(model_path=model, membership_by_rpc=True, **settings)
    config = EngineArgs(**router_engine_kwargs(router, kwargs)).create_engine_config()
    config.cache_config.kv_cache_memory_bytes = engine_kwargs.get("kv_cache_memory_bytes")  # CPUs get one by default
    import experts.vllm_plugin.worker  # noqa: F401 as vLLM's worker does, before it looks for the loader

    asked = get_model_loader(config.load_config).get_external_weight_memory(config)
    snapshot = SimpleNamespace(total_memory=gpu_bytes, free_memory=gpu_bytes, device_="cuda:0")
    budget = gpu_worker.request_memory(snapshot, config.cache_config, asked)
    emit(
        asked=asked,
        taken_off=gpu_worker.request_memory(snapshot, config.cache_config, 0) - budget,
        may_reserve=loaders_may_reserve(),
        asks_the_loader=".get_external_weight_memory(" in inspect.getsource(gpu_worker.Worker.init_device),
        sizes_by_it="self.requested_memory\n            - profile_result.non_kv_cache_memory"
        in inspect.getsource(gpu_worker.Worker.determine_available_memory),
    )
