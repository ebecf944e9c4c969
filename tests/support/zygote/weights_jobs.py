"""Jobs of `engine_zygote` that load checkpoints into vLLM's model and into shards' experts, without an engine.

The model is built once; each case fills it anew. Bytes are compared, which is stronger than tokens and much cheaper.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.zygote.parity_jobs import preload_engine, preload_shard


@dataclass
class Router:
    """vLLM's model of the tiny checkpoint, with its experts replaced."""

    config: Any
    model: Any

    def load(self, folder: Path) -> dict[str, Any]:
        """Its parameters after loading a folder as a router does. Raises what a router's start would."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.config.load import LoadConfig

        from experts.checkpoint import ExpertCheckpoint
        from experts.vllm_plugin.loader import RouterModelLoader

        loader = RouterModelLoader(LoadConfig(load_format="expertmesh", use_tqdm_on_load=False))
        loader._checkpoint = ExpertCheckpoint.open(folder)
        loader._checkpoint.check()
        model_config = copy.copy(self.config.model_config)
        model_config.model = str(folder)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)
        with set_current_vllm_config(self.config):
            loader.load_weights(self.model, model_config)
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def build(model: str) -> Router:
    """The model as an engine's worker builds it."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    import experts.vllm_plugin.worker  # noqa: F401 - registers the layers
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    settings = RouterSettings(model_path=model, membership_by_rpc=True)
    kwargs = router_engine_kwargs(settings, {"model": model, "dtype": "float32", "max_model_len": 128})
    config = EngineArgs(**kwargs).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, get_distributed_init_method("127.0.0.1", get_open_port()), 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(torch.float32)
        return Router(config, initialize_model(vllm_config=config))


def read_experts(folder: Path) -> dict[tuple[int, int], Any]:
    """All experts, as shards and the router's own fallback read them."""
    import torch

    from experts.checkpoint import ExpertCheckpoint

    checkpoint = ExpertCheckpoint.open(folder)
    checkpoint.check()
    return {
        (layer, expert): checkpoint.read_expert(layer, expert, torch.float32)
        for layer in range(checkpoint.spec.num_layers)
        for expert in range(checkpoint.spec.num_experts)
    }


def refusal_between(router: Path, shard: Path) -> str | None:
    """What a shard of one folder says to a router of another, None if it takes it."""
    from experts.checkpoint import ExpertCheckpoint

    if router == shard:
        return None
    ours, theirs = ExpertCheckpoint.open(shard), ExpertCheckpoint.open(router)
    for name, value in ours.facts.items():
        if theirs.facts[name] != value:
            return f"{name} {theirs.facts[name]} {value}"
    differing = ours.start_fingerprint().result().differing(theirs.start_fingerprint().result().to_bytes())
    return ", ".join(differing) or None


def cases(emit: Any, folder: str, seeds: list[int]) -> None:
    """Load the cases of `seeds`: [{seed, steps, side, culprits, refusal or None, wrong: names of unequal bytes}]."""
    import torch

    from tests.support.spoiled_checkpoints import TINY, make_case, tiny_config, tiny_tensors

    router = build(str(TINY))
    right, right_experts = router.load(TINY), read_experts(TINY)
    tensors, config = tiny_tensors(), tiny_config()
    emit(parameters=len(right))
    found = []
    for seed in seeds:
        case = make_case(seed, tensors, config)
        path = case.write(Path(folder) / str(seed))
        sides = {"both": (path, path), "router": (path, TINY), "shard": (TINY, path)}[case.side]
        refusal, wrong = None, []
        try:
            got, experts = router.load(sides[0]), read_experts(sides[1])
            refusal = refusal_between(*sides)
        except ValueError as error:
            refusal = f"{type(error).__name__}: {error}"
        if refusal is None:
            wrong = [name for name, value in right.items() if not torch.equal(value, got[name])]
            wrong += [
                f"expert {key}"
                for key, value in right_experts.items()
                if not torch.equal(value.w13_2ID, experts[key].w13_2ID)
                or not torch.equal(value.w2_DI, experts[key].w2_DI)
            ]
        shutil.rmtree(path)
        facts = {"seed": seed, "steps": case.steps, "side": case.side, "culprits": sorted(case.culprits)}
        found.append({**facts, "refusal": refusal, "wrong": wrong})
    emit(cases=found)


def loads(emit: Any, folders: dict[str, str]) -> None:
    """What loading each folder as a router says: {name: message}, None where it loads."""
    from tests.support.spoiled_checkpoints import TINY
    from tests.support.zygote.plugin_facts import error_of

    router = build(str(TINY))
    emit(errors={name: error_of(router.load, Path(folder)) for name, folder in folders.items()})


PRELOAD = {"engine": preload_engine, "shard": preload_shard}
JOBS = {"cases": cases, "loads": loads}
