"""Why a path is not served that people know of vLLM, Ray Serve LLM or OpenAI."""

from __future__ import annotations

from collections.abc import Collection

from cluster.http.paths.served import GENERATING

_POOLING = (
    *("/v1/embeddings", "/v2/embed", "/embed", "/pooling", "/classify"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
_NO_POOLING = "its model generates text; embeddings, scores and classes are for routers with the option runner: pooling"
_NO_CONTROL = "it controls the engine, which clients may not do; change the config and deploy it again"
_NO_SCALE_OUT = "it is an internal part of vLLM's own scale-out; send /v1/chat/completions or /v1/completions"
_NO_AUDIO = "no model whose experts are on shards takes or makes sound"
_NO_VLLM = "vLLM does not have this part of OpenAI's API"
# By the beginnings of paths.
_ABSENT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("/inference/", "/internal/"), _NO_SCALE_OUT),
    (("/v1/audio/", "/v1/realtime"), _NO_AUDIO),
    (
        (
            *("/sleep", "/wake", "/is_sleeping", "/pause", "/resume", "/is_paused", "/reset_", "/collective_rpc"),
            *("/server_info", "/start_", "/stop_profile", "/finish_weight_update", "/update_weight", "/weight_"),
            *("/is_scaling_elastic_ep", "/abort_requests"),
            *("/fault_tolerance", "/release_kv_cache_memory", "/init_weight_transfer_engine", "/scale_elastic_ep"),
            *("/shutdown_weight_transfer_engine", "/get_world_size", "/kv_event_sources", "/adapters"),
        ),
        _NO_CONTROL,
    ),
    (
        (
            *("/v1/images", "/v1/videos", "/v1/moderations", "/v1/files", "/v1/uploads", "/v1/batches", "/v1/evals"),
            *("/v1/fine_tuning", "/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/conversations"),
            *("/v1/containers",),
        ),
        _NO_VLLM,
    ),
    (
        ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        "routers load an adapter when a request names one; set lora_config and send model:adapter as the model",
    ),
    (("/ping", "/invocations"), "it is SageMaker's; send /v1/chat/completions or /v1/completions"),
    (("/tokenizer_info",), "it shows the chat template, which may be a secret of whoever serves the model"),
)


def why_absent(path: str, there: Collection[str]) -> str | None:
    """Why a path is not served that people know; None for others. `there`: the paths that make the engine work."""
    if path.endswith(("/render", "/derender")):
        return _NO_SCALE_OUT
    pooled = sorted(set(there).intersection(_POOLING))
    if path.startswith((*_POOLING, *GENERATING)) and pooled:
        return f"its engine generates no text, and pools in one way only; it has {', '.join(pooled)}"
    if path.startswith(_POOLING):
        return _NO_POOLING
    return next((why for paths, why in _ABSENT if path.startswith(paths)), None)
