"""Jobs of `engine_zygote` that look at vLLM and the plug-in without an engine; they report and assert nothing."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from experts.vllm_plugin.engine_kwargs import TRACES


def error_of(function: Callable[..., Any], *arguments: Any) -> str | None:
    """What calling it raises, with all that led to it; None if nothing."""
    try:
        function(*arguments)
    except Exception as error:
        chain, seen = [f"{type(error).__name__}: {error}"], error
        while (seen := seen.__cause__ or seen.__context__) is not None:
            chain.append(f"{type(seen).__name__}: {seen}")
        return "\n".join(chain)
    return None


def joints(emit: Any) -> None:
    """The shapes of everything of vLLM that experts.vllm_plugin.joints imports."""
    import torch
    import vllm
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner import moe_runner
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.utils.torch_utils import direct_register_custom_op

    before = sorted(op_registry_oot)
    functions = {
        "RoutedExperts.forward_modular": RoutedExperts.forward_modular,
        "RoutedExperts._get_quant_method": RoutedExperts._get_quant_method,
        "RoutedExperts.load_weights": RoutedExperts.load_weights,
        "RoutedExperts.register_oot": RoutedExperts.register_oot,
        "FusedMoEMethodBase.create_weights": FusedMoEMethodBase.create_weights,
        "FusedMoEMethodBase.apply": FusedMoEMethodBase.apply,
        "FusedMoEMethodBase.maybe_roundup_sizes": FusedMoEMethodBase.maybe_roundup_sizes,
        "SharedExperts.__call__": SharedExperts.forward,
        "register_model_loader": register_model_loader,
        "DefaultModelLoader._get_weights_iterator": DefaultModelLoader._get_weights_iterator,
        "DefaultModelLoader._prepare_weights": DefaultModelLoader._prepare_weights,
        "DefaultModelLoader.load_model": DefaultModelLoader.load_model,
        "direct_register_custom_op": direct_register_custom_op,
    }
    signatures = {name: list(inspect.signature(function).parameters) for name, function in functions.items()}

    import experts.vllm_plugin.worker as worker
    from experts.vllm_plugin.layer import MeshExpertsMixin, NoLocalWeights, register
    from experts.vllm_plugin.loader import LOAD_FORMAT

    register()  # a second time

    class SomebodysExperts(RoutedExperts):
        """As the Transformers backend has one."""

    ops = ("begin", "finish")
    runner_source = inspect.getsource(moe_runner)
    emit(
        version=vllm.__version__,
        signatures=signatures,
        shared_output=[
            name
            for name, source in (
                ("_output", "self._output: list[torch.Tensor | None] = [None, None]"),
                ("_output_idx", "def _output_idx(self) -> int:"),
                ("output", "self._output[self._output_idx] = None"),
            )
            if source in inspect.getsource(SharedExperts)
        ],
        shared_orders=[order.name for order in SharedExpertsOrder],
        runner_calls=[part for part in ("forward_modular(", "shared_experts_input=") if part in runner_source],
        sums_over_workers=_sums_over_workers(),
        source_fields=sorted(field.name for field in dataclasses.fields(DefaultModelLoader.Source)),
        abstract=sorted(FusedMoEMethodBase.__abstractmethods__),
        not_implemented=sorted(getattr(NoLocalWeights, "__abstractmethods__", ())),
        registered_before=before,
        registered=sorted(op_registry_oot),
        replaces=[
            isinstance(RoutedExperts.__new__(RoutedExperts), MeshExpertsMixin),
            isinstance(SomebodysExperts.__new__(SomebodysExperts), MeshExpertsMixin),
        ],
        schemas={name: str(getattr(torch.ops.expertmesh, name).default._schema) for name in ops},
        loader=_loader_of(LOAD_FORMAT),
        clashes=_clashes(worker.ExpertMeshWorker),
    )


def refusal_joints(emit: Any) -> None:
    """The shapes of everything of vLLM by which requests end whose experts are nowhere."""
    import dataclasses

    import vllm
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, core
    from vllm.v1.request import Request
    from vllm.v1.worker import cpu_model_runner, gpu_model_runner
    from vllm.v1.worker.gpu import input_batch as input_batch_2
    from vllm.v1.worker.gpu import model_runner as model_runner_2

    functions = {
        "Scheduler.update_from_output": Scheduler.update_from_output,
        "Scheduler.finish_requests": Scheduler.finish_requests,
        "Scheduler._free_request_blocks": Scheduler._free_request_blocks,
        "KVCacheManager.evict_blocks": KVCacheManager.evict_blocks,
        "KVCacheManager.get_block_ids": KVCacheManager.get_block_ids,
    }
    runners = {"1": gpu_model_runner, "2": model_runner_2}
    emit(
        version=vllm.__version__,
        signatures={name: list(inspect.signature(function).parameters) for name, function in functions.items()},
        is_scheduler=issubclass(AsyncScheduler, Scheduler),
        overridden=[name for name in ("update_from_output", "_free_request_blocks") if name in vars(AsyncScheduler)],
        sample_tokens={
            name: list(inspect.signature(m.GPUModelRunner.sample_tokens).parameters) for name, m in runners.items()
        },
        inherited="sample_tokens" not in vars(cpu_model_runner.CPUModelRunner),
        pool={
            "1": list(inspect.signature(gpu_model_runner.GPUModelRunner._pool).parameters),
            "2": list(inspect.signature(model_runner_2.GPUModelRunner.pool).parameters),
            "1 has that of 2": hasattr(gpu_model_runner.GPUModelRunner, "pool"),
            "inherited": "_pool" not in vars(cpu_model_runner.CPUModelRunner),
            "request": "self.pooling_params" in inspect.getsource(Request.__init__),
        },
        states={name: list(module.ExecuteModelState._fields) for name, module in runners.items()},
        batch_2=[field.name for field in dataclasses.fields(input_batch_2.InputBatch)],
        output=[field.name for field in dataclasses.fields(SchedulerOutput)],
        new=[field.name for field in dataclasses.fields(NewRequestData)],
        cached=[field.name for field in dataclasses.fields(CachedRequestData)],
        core_output=list(EngineCoreOutput.__struct_fields__),
        in_flight="self.num_in_flight_tokens" in inspect.getsource(Request.__init__),
        gone_is_skipped="if request is None or request.is_finished():"
        in inspect.getsource(Scheduler.update_from_output),
        all_frees=inspect.getsource(Scheduler).count("self._free_request_blocks(request)"),
        schedule=list(inspect.signature(Scheduler.schedule).parameters),
        schedule_is_inherited="schedule" not in vars(AsyncScheduler),
        execute_model={
            name: list(inspect.signature(m.GPUModelRunner.execute_model).parameters)[:2] for name, m in runners.items()
        },
        execute_is_inherited="execute_model" not in vars(cpu_model_runner.CPUModelRunner),
        traces_travel=getattr(pickle.loads(pickle.dumps(_marked(SchedulerOutput))), TRACES),
        headers_stay="trace_headers" in inspect.signature(Request.__init__).parameters,
        makes_scheduler="vllm_config=vllm_config," in inspect.getsource(core.EngineCore.__init__),
    )


def _marked(output_class: Any) -> Any:
    """A step's output as the scheduler marks it."""
    output = output_class.make_empty()
    setattr(output, TRACES, {"a": {"traceparent": "x"}})
    return output


def _loader_of(load_format: str) -> str:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    return type(get_model_loader(LoadConfig(load_format=load_format))).__name__


def _clashes(extension: type) -> list[str]:
    """Names that vLLM's workers have themselves: it refuses an extension that has one of them."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    return [name for name in dir(extension) if not name.startswith("__") and hasattr(CPUWorker, name)]


def _sums_over_workers() -> dict[str, Any]:
    """Where vLLM adds up what the workers of a tensor-parallel engine return of a MoE layer."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    final = inspect.getsource(moe_runner.MoERunner._maybe_reduce_final_output)
    return {
        "adds": final.count("tensor_model_parallel_all_reduce(states)"),
        "unless": [
            condition
            for condition in (
                "not self.moe_config.is_sequence_parallel",
                "not self.moe_config.skip_final_all_reduce",
                "(self.moe_config.tp_size > 1 or self.moe_config.ep_size > 1)",
                "not output_is_reduced",
            )
            if condition in final
        ],
        "config": [name for name in ("tp_size", "is_sequence_parallel") if hasattr(FusedMoEConfig, name)],
        "rank": "tp_rank" in FusedMoEParallelConfig.__dataclass_fields__,
    }


def refusals(emit: Any, model: str, cases: dict[str, dict[str, Any]]) -> None:
    """What `check_engine` says of engine arguments: {case: message}, None where it takes them."""
    from vllm.engine.arg_utils import EngineArgs

    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs
    from experts.vllm_plugin.refusals import check_engine, check_layer

    answers: dict[str, str | None] = {}
    for case, arguments in cases.items():
        arguments = dict(arguments)
        by_rpc = arguments.pop("membership_by_rpc", True)
        settings = RouterSettings(
            model_path=arguments.pop("model_path", model),
            membership_by_rpc=by_rpc,
            dispatch_timeout_ms=arguments.pop("dispatch_timeout_ms", 5000.0),
        )
        kwargs = {"model": model, "dtype": "float32", "skip_tokenizer_init": True, **arguments}
        if not kwargs.pop("plain", False):
            kwargs = router_engine_kwargs(settings, kwargs)
        try:
            check_engine(EngineArgs(**kwargs).create_engine_config())
            answers[case] = None
        except Exception as error:
            answers[case] = f"{type(error).__name__}: {error}"
    two_workers = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    for case, sequence_parallel, workers in (("split", False, 2), ("sequence", True, 2), ("whole", False, 1)):
        layer = SimpleNamespace(is_sequence_parallel=sequence_parallel, tp_size=workers)
        answers[case] = error_of(check_layer, "model.layers.3.mlp.experts", layer, two_workers)
    emit(answers=answers)


def verification(emit: Any) -> None:
    """What `verify_model` says of models that were not replaced as a whole, and `split_graphs` of CUDA graphs."""
    import torch
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from experts.vllm_plugin.layer import register
    from experts.vllm_plugin.loader import verify_model
    from experts.vllm_plugin.refusals import split_graphs

    register()

    class OwnExperts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w13_weight = torch.nn.Parameter(torch.zeros(1))

    class SomebodysExperts(RoutedExperts):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    def model_with(layer: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(1, 1), layer)

    def graphs(mode: str, eager: bool = False, device: str = "cuda") -> Any:
        compilation = SimpleNamespace(cudagraph_mode=mode, splitting_ops=["vllm::attention"])
        config = SimpleNamespace(compilation_config=compilation, model_config=SimpleNamespace(enforce_eager=eager))
        return error_of(split_graphs, config, device) or compilation.splitting_ops

    emit(
        own_experts=error_of(verify_model, model_with(OwnExperts())),
        subclass=error_of(verify_model, model_with(SomebodysExperts())),
        dense=error_of(verify_model, model_with(torch.nn.ReLU())),
        full_graphs=graphs("FULL_AND_PIECEWISE"),
        piecewise_graphs=graphs("PIECEWISE"),
        eager_on_gpu=graphs("FULL", eager=True),
        graphs_on_cpu=graphs("FULL", device="cpu"),
    )


def reading(emit: Any, model: str) -> None:
    """What loading touches: names that come, and bytes of the checkpoint's files that this process mapped in."""
    import torch
    from vllm.config.load import LoadConfig

    from experts.checkpoint import ExpertCheckpoint
    from experts.vllm_plugin.loader import RouterModelLoader

    loader = RouterModelLoader(LoadConfig(load_format="expertmesh", use_tqdm_on_load=False))
    loader._checkpoint = ExpertCheckpoint.open(model)
    wanted = SimpleNamespace(model=model, revision=None)
    resident: dict[str, int] = {}
    names, read_bytes = [], 0
    for name, tensor in loader.get_all_weights(wanted, torch.nn.Module()):
        names.append(name)
        read_bytes += tensor.numel() * tensor.element_size()
        tensor.sum()
        for file, nbytes in _mapped_in(model).items():
            resident[file] = max(resident.get(file, 0), nbytes)
    emit(names=names, read_bytes=read_bytes, resident=resident)


def _mapped_in(folder: str) -> dict[str, int]:
    """Resident bytes of this process' mappings of the files in a folder."""
    found: dict[str, int] = {}
    name = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            path = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
            name = os.path.basename(path) if path.startswith(os.path.realpath(folder)) else None
        elif name is not None and first == "Rss:":
            found[name] = found.get(name, 0) + int(line.split()[1]) * 1024
    return found


def steps(emit: Any) -> None:
    """What the plug-in makes of vLLM's forward contexts."""
    import torch
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import ForwardContext, override_forward_context

    from experts.vllm_plugin.joints import step_in_progress

    padding = torch.tensor([False, False, True, True])

    def within(attn_metadata: Any, mode: CUDAGraphMode) -> list[Any]:
        context = ForwardContext(
            no_compile_layers={}, attn_metadata=attn_metadata, slot_mapping={}, cudagraph_runtime_mode=mode
        )
        context.is_padding = padding
        with override_forward_context(context):
            of_requests, rows = step_in_progress()
        return [of_requests, None if rows is None else rows.tolist()]

    emit(
        steps={
            "no engine": list(step_in_progress()),
            "warm-up": within(None, CUDAGraphMode.NONE),
            "eager": within({"a layer": None}, CUDAGraphMode.NONE),
            "graph": within({"a layer": None}, CUDAGraphMode.PIECEWISE),
        }
    )
