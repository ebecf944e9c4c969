"""Mends torch 2.13's Inductor, which may let a CPU graph read a buffer before an operation has written it in place.

To fuse two loops it computes one of them anew, and forgets that what the loop reads was written by an operation after
the buffer was made: with vLLM's `onednn_mm` as a gate, experts were chosen by whatever the memory held. Plain vLLM does
not meet it, since its routing is inside of an operation. https://github.com/pytorch/pytorch/issues/185509, mended in
later versions as here (pull request 185873).
"""

from __future__ import annotations

from typing import Any


def keep_reads_behind_writes() -> None:
    """Have loops that are computed anew keep what they wait for, in this process. Idempotent; before a compilation.

    Graphs that torch's cache has of processes without this are not taken.
    """
    import torch.compiler.config
    from torch._inductor.scheduler import SchedulerNode  # takes a second, which engines without a compiler need not

    computed_anew = SchedulerNode.recompute_size_and_body
    if getattr(computed_anew, "keeps_reads_behind_writes", False):
        return

    def recompute_size_and_body(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        computed_anew(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    torch.compiler.config.cache_key_tag += "reads-behind-writes"
    recompute_size_and_body.keeps_reads_behind_writes = True  # type: ignore[attr-defined]
    SchedulerNode.recompute_size_and_body = recompute_size_and_body  # type: ignore[method-assign]
