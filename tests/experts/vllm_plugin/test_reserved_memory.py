"""vLLM leaves GPU memory for what a router allocates after the KV cache was sized.

vLLM's own arithmetic runs here, with a made-up GPU; that the memory suffices has not been measured on one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experts.protocol.settings import RouterSettings
from experts.protocol.wire import reply_capacity, request_capacity
from experts.transports.device_memory import COMMUNICATOR_BYTES, pair_device_bytes, router_device_bytes
from tests.support.zygote.engine_zygote import Zygote

GPU_BYTES = 80 << 30
SIZES = {"reserve_for_shards": 3, "max_rows_per_dispatch": 64, "fallback_cache_bytes": 1 << 20, "transport": "nccl"}
HIDDEN, TOP_K = 64, 2


@pytest.fixture(scope="module")
def model(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen3_moe"
    overrides = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    job = vllm_zygote.start("checkpoint", family="qwen3_moe", path=str(folder), overrides=overrides)
    vllm_zygote.wait(job, "made")
    return folder


def reserved(zygote: Zygote, model: Path, **engine_kwargs: Any) -> dict[str, Any]:
    job = zygote.start("reserved", model=str(model), settings=SIZES, engine_kwargs=engine_kwargs, gpu_bytes=GPU_BYTES)
    zygote.wait(job, "sizes_by_it")
    return zygote.events(job)


def test_vllm_takes_what_pairs_need_off_its_kv_cache(vllm_zygote: Zygote, model: Path) -> None:
    facts = reserved(vllm_zygote, model)
    pair = request_capacity(64, TOP_K, HIDDEN * 2) + reply_capacity(64, HIDDEN * 2) + COMMUNICATOR_BYTES
    rest = 64 * HIDDEN * 4 + 4 * 64 * TOP_K * 4
    assert facts["asked"] == 3 * pair + (1 << 20) + rest
    moved = "vllm moved how a loader has memory left; see get_external_weight_memory in experts/vllm_plugin/loader.py"
    assert facts["taken_off"] == facts["asked"], moved
    assert facts["may_reserve"], moved
    assert facts["asks_the_loader"], moved
    assert facts["sizes_by_it"], moved


def test_a_cache_whose_size_is_given_keeps_it(vllm_zygote: Zygote, model: Path) -> None:
    assert reserved(vllm_zygote, model, kv_cache_memory_bytes=1 << 30)["asked"] == 0


@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "tcp"])
def test_only_nccl_keeps_rows_on_the_routers_gpu(transport: str) -> None:
    assert pair_device_bytes(transport, 64, TOP_K, HIDDEN * 2) == 0
    assert pair_device_bytes("auto", 64, TOP_K, HIDDEN * 2) == pair_device_bytes("nccl", 64, TOP_K, HIDDEN * 2) > 0


def test_a_router_that_computes_nothing_keeps_no_experts() -> None:
    sizes_of = {"reserve_for_shards": 0, "fallback_cache_bytes": 1 << 20}
    settings = RouterSettings(model_path="m", fallback_max_ms_per_step=0, **sizes_of)
    computing = settings.model_copy(update={"fallback_max_ms_per_step": 1.0})
    sizes = (TOP_K, HIDDEN * 2, HIDDEN)
    assert router_device_bytes(computing, *sizes) - router_device_bytes(settings, *sizes) == 1 << 20
