"""What cluster/adapters takes of vLLM: a new version that moves it fails here, by name."""

from __future__ import annotations

import inspect


def test_adapters_are_loaded_and_listed_as_they_were() -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    assert list(inspect.signature(OpenAIServingModels.load_lora_adapter).parameters)[:2] == ["self", "request"]
    assert {"lora_name", "lora_path"} <= set(LoadLoRAAdapterRequest.model_fields)
    assert "self.lora_requests[lora_name] = lora_request" in inspect.getsource(OpenAIServingModels.load_lora_adapter)
    assert list(inspect.signature(OpenAIModelRegistry.show_available_models).parameters) == ["self"]
    assert list(inspect.signature(AsyncLLM.remove_lora).parameters) == ["self", "lora_id"]
