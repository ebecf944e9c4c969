"""Records the router's own decisions, whole tokens over all layers: for the controller, and for whoever asks.

Legend: T tokens, K top-k, L MoE layers.

A step's ids are copied layer by layer into one buffer and offered to those who read at the last layer. Dispatch has
them in host memory anyway, so recording waits for no device. Rows that want no expert in any layer are padding and are
left out; the plug-in does not pass on steps of warm-up.

Nobody takes anything from another: the controller has an observer of its own, which counts only while the controller
wants to know, and each reader of traces a sample that begins when that reader says so. The reader without a name is
there from the start, and what it has fades. Loads of experts are counted only for as long as somebody asks for them
again and again, and prompts are sampled only once somebody wants them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experts.dispatch.layer_shape import LayerShape
from placement.traces.observer import StepObserver
from placement.traces.prompts import NewPrompt, PromptSample, PromptSamples
from placement.traces.recorder import TraceRecorder

MOST_READERS = 4  # with a name; one more takes the place of the one that was silent longest


class StepRecorder:
    """Collects one step's decisions and passes whole tokens on.

    `capacity`: tokens of each reader's sample, 0 for no traces; `observed_tokens`: sampled tokens between two calls of
    `observation`, 0 to observe nothing ever. `layers` are the model's own numbers of its MoE layers; they default to
    0, 1, 2 and so on. `guesses`: the shape's draft layers run here, after the step; where they do not, they have -1.
    """

    def __init__(
        self,
        shape: LayerShape,
        capacity: int,
        layers: tuple[int, ...] = (),
        half_life_tokens: float | None = None,
        observed_tokens: int = 0,
        guesses: bool = False,
    ) -> None:
        self._shape, self._capacity, self._layers = shape, capacity, layers
        self._last_layer = shape.num_layers - 1 if guesses else shape.last_of_step
        self._step_LTK = np.zeros((shape.num_layers, 0, shape.top_k), np.int16)
        self._prefill_T: np.ndarray | None = None
        self._num_tokens = 0
        self._next_layer = 0
        self._readers: dict[str, TraceRecorder] = {}  # of names, the one heard of last at the end
        self._unnamed, self._observer, self._observing = None, None, False
        self._loads: TraceRecorder | None = None  # of which only the counts are read
        self._counting_since, self._counts_until_s = 0.0, 0.0  # seconds since 1970, and on time.monotonic()
        self._steps, self._rows, self._activated = 0, 0, 0  # of those counts
        self._prompts: PromptSamples | None = None  # from the first call of `prompts` on
        self._last_TLK: np.ndarray | None = None  # the step before; the next one overwrites it
        if capacity:
            self._unnamed = self._sample(half_life_tokens)
        if observed_tokens:
            self._observer = StepObserver(
                shape.num_layers, shape.num_experts, shape.top_k, observed_tokens, layers=layers
            )

    @property
    def wants_phases(self) -> bool:
        """Whether it matters which rows are of prompts."""
        return self._observing or self._loads is not None

    def begin_step(self, prefill_T: np.ndarray | None) -> None:
        """Rows of prompts in the step whose layers follow: bool [T], or None if there are none."""
        self._end_without_guesses()
        self._prefill_T = prefill_T

    def add(self, layer: int, topk_ids_TK: np.ndarray) -> None:
        """Record the decisions of one layer (any integers, -1 for none); a step's last layer completes its tokens.

        An interrupted step, whose layers do not follow one another, is left out.
        """
        if self._unnamed is None and not self._observing and self._loads is None and self._prompts is None:
            return
        num_tokens = len(topk_ids_TK)
        if layer == 0:
            self._end_without_guesses()
            self._num_tokens, self._last_TLK = num_tokens, None
            if num_tokens > self._step_LTK.shape[1]:
                self._step_LTK = np.empty((self._shape.num_layers, num_tokens, self._shape.top_k), np.int16)
        elif layer != self._next_layer or num_tokens != self._num_tokens:
            self._next_layer = -1
            return
        self._step_LTK[layer, :num_tokens] = topk_ids_TK
        self._next_layer = layer + 1
        if layer == self._shape.last_of_step:
            self._last_TLK = self._step_LTK[: layer + 1, :num_tokens].transpose(1, 0, 2)
            self._step_LTK[layer + 1 :, :num_tokens] = -1
        if layer == self._last_layer:
            self._next_layer = -1
            self._complete(self._step_LTK[:, :num_tokens].transpose(1, 0, 2))

    def _end_without_guesses(self) -> None:
        """Take the step before as it is if nobody guessed after it, as at the end of a context."""
        if self._shape.last_of_step < self._next_layer <= self._last_layer:
            self._next_layer = -1
            self._complete(self._step_LTK[:, : self._num_tokens].transpose(1, 0, 2))

    def observation(self, go_on: bool) -> bytes:
        """What was observed since the last call, as an `Observation`'s bytes; empty if nothing was observed.

        `go_on`: whether to observe from now on. A recorder begins without.
        """
        told = self._observer.take().to_bytes() if self._observer is not None and self._observing else b""
        self._observing = go_on and self._observer is not None
        return told

    def loads(self, watch_s: float) -> dict[str, Any]:
        """Tokens and their picks since counting began, which ends `watch_s` after this call if nobody asks again.

        `counts`: int64 [L, E] as bytes; `since` in seconds since 1970 names the count, as it begins at 0 after a pause.
        `activated`: distinct experts, summed over layers and over those `steps`, of `rows` in all, that only generate.
        """
        now_s = time.monotonic()
        if self._loads is None:
            self._loads = TraceRecorder(
                self._shape.num_layers, self._shape.num_experts, self._shape.top_k, 1, layers=self._layers
            )
            self._counting_since = time.time()
            self._steps, self._rows, self._activated = 0, 0, 0
        self._counts_until_s = now_s + watch_s
        counts_LE = self._loads.counts_LE
        return {
            "since": self._counting_since,
            "tokens": int(self._loads.tokens_seen),
            "steps": self._steps,
            "rows": self._rows,
            "activated": self._activated,
            "layers": list(self._loads.layers),
            "num_experts": self._shape.num_experts,
            "counts": counts_LE.astype("<i8").tobytes(),
        }

    def prompts(self) -> list[PromptSample]:
        """Samples of the prompts since the last call; the first call begins and has none."""
        self._prompts = self._prompts or PromptSamples(self._shape.num_experts)
        return self._prompts.take()

    def note_prompts(self, prompts: Sequence[NewPrompt]) -> None:
        """Say which rows of the step that was recorded last are of new prompts. Nothing before `prompts` was called."""
        if self._prompts is not None and self._last_TLK is not None:
            self._prompts.add(self._last_TLK, prompts)

    def to_bytes(self, reader: str = "") -> bytes:
        """The sample of a reader as an .npz file's bytes, empty if nothing was recorded. RuntimeError when off.

        A name that is not known begins now.
        """
        self._check_on()
        recorder = self._unnamed if not reader else self._readers.pop(reader, None)
        if recorder is None:
            recorder = self._sample(None)
        if reader:
            self._readers[reader] = recorder
            self._forget_silent()
        return recorder.snapshot().to_bytes() if recorder.tokens_seen else b""

    def clear(self, reader: str = "") -> None:
        """Let a reader begin anew; others keep what they have. RuntimeError when recording is off."""
        self._check_on()
        if not reader:
            assert self._unnamed is not None
            self._unnamed.clear()
            self._next_layer = -1
            return
        recorder = self._readers.pop(reader, None) or self._sample(None)
        recorder.clear()
        self._readers[reader] = recorder
        self._forget_silent()

    def end(self, reader: str) -> None:
        """The reader is done; its sample is dropped."""
        self._readers.pop(reader, None)

    def _complete(self, ids_TLK: np.ndarray) -> None:
        prefill_T, self._prefill_T = self._prefill_T, None
        if self._observer is not None and self._observing:
            if prefill_T is not None and len(prefill_T) < len(ids_TLK):
                prefill_T = None  # of another step
            self._observer.add(ids_TLK, prefill_T, time.time())
        if self._loads is not None:
            if time.monotonic() < self._counts_until_s:
                self._loads.add(ids_TLK)
                if prefill_T is None:
                    self._steps += 1
                    self._rows += len(ids_TLK)
                    self._activated += self._distinct(ids_TLK)
            else:
                self._loads = None
        if self._unnamed is not None:
            self._unnamed.add(ids_TLK)
        for recorder in self._readers.values():
            recorder.add(ids_TLK)

    def _distinct(self, ids_TLK: np.ndarray) -> int:
        """Experts that a step uses, summed over layers."""
        used_LE = np.zeros((self._shape.num_layers, self._shape.num_experts + 1), np.bool_)  # the last one: none
        np.put_along_axis(used_LE, ids_TLK.transpose(1, 0, 2).reshape(len(used_LE), -1).astype(np.int64), True, axis=1)
        return int(used_LE[:, :-1].sum())

    def _sample(self, half_life_tokens: float | None) -> TraceRecorder:
        shape = self._shape
        return TraceRecorder(
            *(shape.num_layers, shape.num_experts, shape.top_k, self._capacity),
            half_life_tokens=half_life_tokens,
            layers=self._layers,
        )

    def _forget_silent(self) -> None:
        while len(self._readers) > MOST_READERS:
            del self._readers[next(iter(self._readers))]

    def _check_on(self) -> None:
        if self._unnamed is None:
            raise RuntimeError("trace_tokens is 0, so this router records no trace")
