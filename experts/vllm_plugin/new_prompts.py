"""Tells which rows of a step are of prompts that begin in it, with their tokens: only for who asks.

It touches vLLM's internals (0.32) beside `joints`; `tests/experts/vllm_plugin/test_joints.py` says what a later version
moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from experts.vllm_plugin.joints import VllmConfig, model_runner, rows_of_requests
from placement.traces.prompts import NewPrompt


def note_new_prompts(config: VllmConfig, note: Callable[[list[NewPrompt]], None]) -> None:
    """Call `note` after each forward pass that has new prompts, from now on. A second call does nothing."""
    runner = model_runner(config)
    execute_model = runner.execute_model
    if hasattr(execute_model, "notes_prompts"):
        return

    @functools.wraps(execute_model)
    def execute_and_note(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        found = execute_model(self, scheduler_output, *args, **kwargs)
        new = scheduler_output.scheduled_new_reqs
        if new and self.execute_model_state is not None:
            note(_new_prompts(self, new))
        return found

    execute_and_note.notes_prompts = True  # type: ignore[attr-defined]
    runner.execute_model = execute_and_note


def _new_prompts(runner: Any, new: list[Any]) -> list[NewPrompt]:
    tokens_of = {each.req_id: each.prompt_token_ids for each in new if each.prompt_token_ids}
    found, row = [], 0
    for request_id, num_rows in zip(*rows_of_requests(runner, runner.execute_model_state), strict=True):
        if request_id in tokens_of:
            found.append(NewPrompt(tokens_of[request_id], row, num_rows))
        row += num_rows
    return found
