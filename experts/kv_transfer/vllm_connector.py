"""vLLM's connector between prefill and decode routers: what `kv_connector_module_path` names.

Everything here touches vLLM's internals (0.32); its test says what a later version moved. A prompt that is asked for
is written after the step that completes it, however many steps it took. A request that brings a handover waits, beside
the steps of others, until a thread has put the blocks into the cache; if the file is not there or not right, vLLM
computes the prompt itself (`kv_load_failure_policy: recompute`).

Legend: B blocks of one prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import Request, RequestStatus

from experts.checkpoint import ExpertCheckpoint
from experts.checkpoint.fingerprint import Fingerprint
from experts.kv_transfer.files import BadKVFileError, KVFolder, Label
from experts.kv_transfer.handover import Handover, asked_name, digest_of
from experts.protocol.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

FINGERPRINT_S = 120.0
IDLE_WAIT_S = 0.005  # an engine that only waits for blocks looks so often
FINISHED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class Transfer:
    """Blocks of one prompt that are written to a file, or read from one."""

    request_id: str
    name: str
    tokens: bytes
    block_ids_B: list[int]
    skip: int = 0  # blocks that the reader has already
    keep: bool = False


@dataclass
class Transfers(KVConnectorMetadata):
    """What the worker does in one step."""

    writes: list[Transfer] = field(default_factory=list)
    reads: list[Transfer] = field(default_factory=list)


class PromptFiles(KVConnectorBase_V1):
    """Both halves of the connector: vLLM makes one object for its scheduler and one for its worker."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _check(vllm_config, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._folder = KVFolder(extra["folder"], int(extra["max_bytes"]))
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        # Of the scheduler:
        self._asked: dict[str, Request] = {}
        self._reads: list[Transfer] = []
        self._offered: set[str] = set()  # requests whose handover was made use of, once
        # Of the worker:
        self._worker = _Worker(self._folder, vllm_config.model_config.model) if role == KVConnectorRole.WORKER else None

    # The scheduler's half

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens of the prompt that a handover has beyond those computed, whether they come beside the steps)."""
        handover = Handover.of(request.kv_transfer_params)
        if handover is None or request.request_id in self._offered:
            return 0, False
        if handover.num_tokens != request.num_prompt_tokens or handover.digest != _digest(request).hex():
            logger.warning("request %s: the handover is of another prompt; it is computed here", request.request_id)
            return 0, False
        beyond = request.num_prompt_tokens - num_computed_tokens
        return (beyond, True) if beyond > self._block_size else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note what is to be read, or that a request is to be written."""
        if asked_name(request.kv_transfer_params) is not None:
            self._asked[request.request_id] = request
        handover = Handover.of(request.kv_transfer_params)
        if handover is None or num_external_tokens == 0:
            return
        self._offered.add(request.request_id)
        self._reads.append(
            Transfer(
                request.request_id,
                handover.name,
                bytes.fromhex(handover.digest),
                self._blocks_of(request, blocks.get_block_ids()[0]),
                skip=(request.num_prompt_tokens - num_external_tokens) // self._block_size,
                keep=handover.keep,
            )
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Transfers:
        """What the worker reads from now on, and the prompts that this step completes."""
        reads, self._reads = self._reads, []
        return Transfers([] if not self._asked else self._completed(scheduler_output), reads)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The handover of a prompt that was written; nothing is left of one that ended otherwise."""
        self._offered.discard(request.request_id)
        name = asked_name(request.kv_transfer_params)
        if name is None:
            return False, None
        self._asked.pop(request.request_id, None)
        if request.status not in FINISHED:
            self._folder.remove(name)
            return False, None
        try:
            written = self._folder.path(name).exists()
        except BadKVFileError:
            written = False
        handover = Handover(name, request.num_prompt_tokens, _digest(request).hex())
        return False, handover.to_params() if written else None

    def _completed(self, output: SchedulerOutput) -> list[Transfer]:
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        found = []
        for request_id, request in self._asked.items():
            before = computed.get(request_id)
            if before is None or before >= request.num_prompt_tokens:
                continue
            if before + output.num_scheduled_tokens.get(request_id, 0) >= request.num_prompt_tokens:
                assert self._kv_cache_manager is not None
                blocks = self._blocks_of(request, self._kv_cache_manager.get_block_ids(request_id)[0])
                name = asked_name(request.kv_transfer_params) or ""
                found.append(Transfer(request_id, name, _digest(request), blocks))
        return found

    def _blocks_of(self, request: Request, block_ids: list[int]) -> list[int]:
        return list(block_ids[: -(-request.num_prompt_tokens // self._block_size)])

    # The worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the caches of all layers, each [blocks, ...]."""
        assert self._worker is not None
        self._worker.use(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Hand what is to be read to the thread."""
        assert self._worker is not None
        self._worker.read(self._transfers().reads, idle=forward_context.attn_metadata is None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No request of a step waits for blocks."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Prompts are written once they are complete."""

    def wait_for_save(self) -> None:
        """Write the prompts that this step has completed."""
        assert self._worker is not None
        for transfer in self._transfers().writes:
            self._worker.write(transfer)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests whose blocks are there now, and those that have to be computed."""
        assert self._worker is not None
        done, failed = self._worker.results()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def shutdown(self) -> None:
        """End the thread."""
        if self._worker is not None:
            self._worker.close()

    def _transfers(self) -> Transfers:
        found = self._get_connector_metadata()
        assert isinstance(found, Transfers)
        return found


class _Worker:
    """The caches of an engine's layers, files to and from them, and the thread that reads."""

    def __init__(self, folder: KVFolder, model: str) -> None:
        self._folder = folder
        self._caches: list[torch.Tensor] = []
        self._layout = ""
        self._weights: Future[Fingerprint] = ExpertCheckpoint.open(model).start_fingerprint()
        self._queue: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._pending = 0
        self._idle = False
        self._thread = threading.Thread(target=self._run, name="kv-reader", daemon=True)

    def use(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The caches by layer. UnsupportedModelError if they are on a GPU."""
        found: dict[int, torch.Tensor] = {}
        for name in sorted(kv_caches):
            cache = kv_caches[name]
            if not isinstance(cache, torch.Tensor) or cache.device.type != "cpu":
                raise UnsupportedModelError(
                    f"the KV cache of {name} is no tensor on the CPU; on GPUs set engine_kwargs.kv_transfer_config"
                )
            found.setdefault(cache.data_ptr(), cache)  # layers may share one
        self._caches = list(found.values())
        self._layout = json.dumps([(name, list(kv_caches[name].shape[1:]), str(kv_caches[name].dtype)) for name in
                                   sorted(kv_caches)])  # fmt: skip
        self._thread.start()

    def write(self, transfer: Transfer) -> None:
        """Leave a prompt's blocks in its file; without it, whoever reads computes them."""
        ids_B = torch.tensor(transfer.block_ids_B)
        parts = (cache.index_select(0, ids_B).contiguous().view(-1).view(torch.uint8).numpy() for cache in self._caches)
        try:
            self._folder.write(transfer.name, self._label(transfer), parts)
        except (OSError, BadKVFileError) as error:
            logger.warning("request %s leaves no KV file: %s", transfer.request_id, error)

    def read(self, transfers: list[Transfer], idle: bool) -> None:
        """Have the thread read. `idle`: the engine computes nothing in this step."""
        with self._changed:
            self._pending += len(transfers)
            self._idle = idle
        for transfer in transfers:
            self._queue.put(transfer)

    def results(self) -> tuple[set[str], set[str]]:
        """(requests that have ended reading, those of them that failed) since the last call."""
        with self._changed:
            if self._idle and self._pending and not self._done:
                self._changed.wait(IDLE_WAIT_S)
            done, self._done = self._done, set()
            failed, self._failed = self._failed, set()
        return done, failed

    def close(self) -> None:
        """End the thread after what it reads now."""
        self._queue.put(None)

    def _run(self) -> None:
        while (transfer := self._queue.get()) is not None:
            failed = True
            try:
                self._fill(transfer)
                failed = False
            except BadKVFileError as error:
                logger.warning("request %s computes its prompt itself: %s", transfer.request_id, error)
            except Exception:
                logger.exception("request %s computes its prompt itself", transfer.request_id)
            with self._changed:
                self._pending -= 1
                self._done.add(transfer.request_id)
                if failed:
                    self._failed.add(transfer.request_id)
                self._changed.notify_all()
            if not transfer.keep:
                self._folder.remove(transfer.name)

    def _fill(self, transfer: Transfer) -> None:
        """Put a file's blocks into the caches. Nothing is touched before all of it was checked."""
        num_blocks = len(transfer.block_ids_B)
        sizes = [cache[:1].numel() * cache.element_size() * num_blocks for cache in self._caches]
        data = self._folder.read(transfer.name, self._label(transfer), sum(sizes))
        ids = torch.tensor(transfer.block_ids_B[transfer.skip :])
        for cache, part in zip(self._caches, np.split(data, np.cumsum(sizes)[:-1]), strict=True):
            blocks = torch.from_numpy(part).view(cache.dtype).view(num_blocks, *cache.shape[1:])
            cache.index_copy_(0, ids, blocks[transfer.skip :])

    def _label(self, transfer: Transfer) -> Label:
        weights = self._weights.result(FINGERPRINT_S).to_bytes()
        return Label(hashlib.sha256(self._layout.encode() + weights).digest(), transfer.tokens)


def _digest(request: Request) -> bytes:
    """Of everything that a prompt's KV cache depends on, beside the weights."""
    adapter = "" if request.lora_request is None else request.lora_request.lora_name
    return digest_of(request.prompt_token_ids or (), [adapter, *(item.identifier for item in request.mm_features)])


def _check(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse engines whose cache this connector does not move. UnsupportedModelError names what is in the way."""
    workers, groups = config.parallel_config.tensor_parallel_size, len(kv_cache_config.kv_cache_groups)
    if workers != 1:
        raise UnsupportedModelError(f"tensor_parallel_size is {workers}; pools move the KV cache of one worker alone")
    if groups != 1:
        raise UnsupportedModelError(
            f"the model's KV cache has {groups} groups of layers, which differ in what they keep; pools move one alone"
        )
