"""Jobs of `engine_zygote` about LoRA adapters: checkpoints with merged ones, and a router that applies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.zygote import parity_jobs
from tests.support.zygote.plugin_facts import error_of

NEW_TOKENS = 24


def joints(emit: Any) -> None:
    """The shapes of everything of vLLM by which adapters are loaded, and what the plug-in makes of it."""
    import inspect

    import torch
    import vllm
    from vllm.lora import model_manager, worker_manager
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.model_executor.layers.linear import LinearBase

    functions = {
        "get_supported_lora_modules": model_manager.get_supported_lora_modules,
        "from_layer": model_manager.from_layer,
        "from_layer_logits_processor": model_manager.from_layer_logits_processor,
        "WorkerLoRAManager._load_adapter": worker_manager.WorkerLoRAManager._load_adapter,
        "get_adapter_absolute_path": worker_manager.get_adapter_absolute_path,
    }
    signatures = {name: list(inspect.signature(function).parameters) for name, function in functions.items()}

    class Layers(torch.nn.Module):
        """A MoE layer and a linear one, with nothing in them."""

        def __init__(self) -> None:
            super().__init__()
            for name, kind in (("experts", model_manager.MoERunner), ("q_proj", LinearBase)):
                layer = kind.__new__(kind)
                torch.nn.Module.__init__(layer)
                setattr(self, name, layer)

    wrapped_before = sorted(model_manager.get_supported_lora_modules(Layers()))
    from experts.vllm_plugin import joints as ours
    from experts.vllm_plugin import worker

    patched = [getattr(model_manager, name) for name in ("get_supported_lora_modules", "from_layer")]
    load = worker_manager.WorkerLoRAManager._load_adapter
    ours.leave_moe_layers_without_adapters()
    ours.keep_a_slot_without_adapter()
    ours.check_adapters(worker.refuse_adapter)
    manager = inspect.getsource(model_manager.LoRAModelManager)
    emit(
        version=vllm.__version__,
        signatures=signatures,
        wrapped_before=wrapped_before,
        wrapped=sorted(model_manager.get_supported_lora_modules(Layers())),
        once=patched == [getattr(model_manager, name) for name in ("get_supported_lora_modules", "from_layer")]
        and load is worker_manager.WorkerLoRAManager._load_adapter,
        asks=[
            " ".join(text.split())
            for text in (
                "self.supported_lora_modules = get_supported_lora_modules(self.model)",
                "new_module = from_layer( module, self.lora_slots,",
                "from_layer_logits_processor( logits_processor_module, module, self.lora_slots,",
                "self.modules: dict[str, BaseLayerWithLoRA] = {}",
                "self.packed_modules: dict[str, list[str]] = {}",
            )
            if text in " ".join(manager.split())
        ],
        last_slot_is_taken="lora_b_weights[lora_indices_tensor]" in inspect.getsource(punica_cpu.bgmv_expand),
        registry_is_used="self.lora_manager = LRUCacheWorkerLoRAManager(" in inspect.getsource(_runner_mixin()),
    )


def _runner_mixin() -> Any:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    return LoRAModelRunnerMixin


def checkpoint(emit: Any, family: str | None, source: str, folder: str, adapters: dict[str, list[str]]) -> None:
    """A base model in `folder`, random or made of `source`; adapters for layers whose names have one of the given parts
    each, and the model with each of them merged. Emits where they are.
    """
    from tests.support.random_adapters import layers_of, merge, untied, write_adapter
    from tests.support.random_checkpoints import make_checkpoint

    home = Path(folder)
    base = home / "base"
    if family is None:
        untied(Path(source), base)
    else:
        make_checkpoint(family, base)
    made: dict[str, dict[str, str]] = {}
    for seed, (name, parts) in enumerate(adapters.items(), start=1):
        layers = layers_of(base, lambda layer, parts=parts: any(f".{part}." in f".{layer}." for part in parts))  # type: ignore[misc]
        adapter = write_adapter(home / "adapters" / name, base, layers, seed=seed)
        made[name] = {"adapter": str(adapter), "merged": str(merge(base, adapter, home / "merged" / name))}
    emit(base=str(base), made=made)


def plain(emit: Any, model: str) -> None:
    """vLLM's own engine: greedy tokens, and how far each is ahead of the next."""
    engine = parity_jobs._engine(model, {})
    ids = parity_jobs._greedy(engine, parity_jobs.NEW_TOKENS)
    emit(gaps=parity_jobs._gaps(engine, ids), ids=ids)


def router(
    emit: Any, model: str, membership: dict[str, Any], adapters: dict[str, str], refused: dict[str, str]
) -> None:
    """A router with room for one adapter: the base model's tokens, each adapter's twice in turn, and why others are
    refused.
    """
    from vllm.lora.request import LoRARequest

    engine = _router(model, membership, {})
    requests = _requests(adapters)
    emit(base=_tokens(engine, None))
    turns = [(name, _tokens(engine, request)) for _ in range(2) for name, request in requests.items()]
    add = engine.llm_engine.add_lora
    emit(refusals={name: error_of(add, LoRARequest(name, 100, path)) for name, path in refused.items()})
    (status,) = engine.collective_rpc("expertmesh_status")
    emit(turns=turns, mixed=_mixed(engine, requests), base_again=_tokens(engine, None), status=status)


def together(
    emit: Any, model: str, membership: dict[str, Any], adapters: dict[str, str], options: dict[str, Any]
) -> None:
    """A router with other engine options beside adapters: the first tokens of each adapter and of none in `turns`,
    `mixed`, the status of each of its workers and vLLM's `counters`.
    """
    parity_jobs.fork_workers()
    engine = _router(model, membership, {"disable_log_stats": False, **options})
    requests = _requests(adapters)
    turns = [(name, _tokens(engine, request, NEW_TOKENS)) for name, request in {**requests, "": None}.items()]
    mixed = _mixed(engine, requests)
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    emit(turns=turns, mixed=mixed, counters=counters, statuses=engine.collective_rpc("expertmesh_status"))


def _router(model: str, membership: dict[str, Any], options: dict[str, Any]) -> Any:
    """An engine over shards with room for one adapter."""
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    settings = RouterSettings(model_path=model, membership_by_rpc=True, router_id="r")
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    engine = parity_jobs._engine(model, router_engine_kwargs(settings, {**lora, **options}))
    engine.collective_rpc("expertmesh_use_membership", args=(membership,))
    return engine


def _requests(adapters: dict[str, str]) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    return {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), start=1)}


def _tokens(engine: Any, request: Any, count: int = parity_jobs.NEW_TOKENS) -> list[list[int]]:
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in parity_jobs.prompts()],
        parity_jobs.greedy_sampling(count),
        use_tqdm=False,
        lora_request=request,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _mixed(engine: Any, requests: dict[str, Any]) -> dict[str, list[int]]:
    """Tokens of one prompt for each adapter and for the base model, asked for at the same time."""
    prompt, sampling = parity_jobs.prompts()[-1], parity_jobs.greedy_sampling(NEW_TOKENS)
    for name, request in {"": None, **requests}.items():
        engine.llm_engine.add_request(f"{name}-", {"prompt_token_ids": prompt}, sampling, lora_request=request)
    done: dict[str, list[int]] = {}
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            if output.finished:
                done[output.request_id.partition("-")[0]] = list(output.outputs[0].token_ids)
    return done


JOBS = {
    "adapter_joints": joints,
    "adapter_checkpoint": checkpoint,
    "adapter_plain": plain,
    "adapter_router": router,
    "adapter_together": together,
}
