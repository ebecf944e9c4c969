"""An engine that pools: it makes embeddings, scores or classes of prompts, and generates nothing.

Where its steps end differently, this touches vLLM's internals (0.32) beside `joints`;
`tests/experts/vllm_plugin/test_joints.py` says what a later version moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experts.vllm_plugin.joints import VllmConfig, model_runner, report_refused, requests_of_rows, with_refused


def pools(config: VllmConfig) -> bool:
    """Whether this engine pools; vLLM has decided it by options and by the model's files."""
    return config.model_config.runner_type == "pooling"


def report_refused_prompts(
    config: VllmConfig, take_refused: Callable[[], np.ndarray | None], count: Callable[[int], None]
) -> None:
    """`joints.report_refused` for an engine that pools, whose steps sample no tokens."""
    runner = model_runner(config)
    if hasattr(runner, "pool"):  # model runner 2
        report_refused(config, take_refused, count, ending="pool")
        return
    pool = runner._pool

    @functools.wraps(pool)
    def pool_and_report(self: Any, rows_TD: torch.Tensor, num_rows: int, lengths_R: np.ndarray, *args: Any) -> Any:
        output, refused_T = pool(self, rows_TD, num_rows, lengths_R, *args), take_refused()
        if refused_T is None:
            return output
        refused = requests_of_rows(self.input_batch.req_ids, lengths_R.tolist(), refused_T)
        count(len(refused))
        return with_refused(output, refused)

    runner._pool = pool_and_report
