"""The process that prices and searches: numba and its memory stay out of the controller, and searches off its loop.

    python -m cluster.autopilot.background      jobs on standard input, results on standard output

It starts with the first job, goes with the controller (its standard input ends), and is started again if it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import struct
import sys
from typing import Any, BinaryIO

from cluster.autopilot.jobs import Failure, Job, JudgeJob, Prepared, PrepareJob, Result, Verdict
from cluster.priority import lower

logger = logging.getLogger("ray.serve")

_LENGTH = struct.Struct("<Q")


class JobError(RuntimeError):
    """A job has no result; the message says why, in one line."""


class Background:
    """One process, one job at a time. `process` is None before the first job, and after a failure."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None

    async def run(self, job: Job, timeout_s: float) -> Result:
        """The result. JobError if the job fails, takes longer, or the process ends, which is then replaced."""
        try:
            async with asyncio.timeout(timeout_s):
                process = await self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                told = pickle.dumps(job, protocol=5)
                process.stdin.write(_LENGTH.pack(len(told)) + told)
                await process.stdin.drain()
                (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
                answer = pickle.loads(await process.stdout.readexactly(length))
        except TimeoutError:
            await self.stop()
            raise JobError(f"no result within {timeout_s:g} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            await self.stop()
            raise JobError(f"its process ended: {error!r}") from None
        except asyncio.CancelledError:
            await self.stop()
            raise
        if isinstance(answer, Failure):
            raise JobError(answer.reason)
        result: Result = answer
        return result

    async def stop(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        if self.process is None or self.process.returncode is not None:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cluster.autopilot.background"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self.process


def do(job: Job) -> Result:
    """The result of a job, in this process."""
    from cluster.autopilot.pricing import StepPrice, price_steps, recut  # they import numba
    from cluster.autopilot.proposals import prepare, propose

    if isinstance(job, PrepareJob):
        prepare()
        return Prepared()
    if not isinstance(job, JudgeJob):
        return propose(job)
    price = StepPrice.of(job.model)
    steps = [step for step in job.seen.sampled if len(step.topk_ids)]
    prices = tuple(price_steps(placement, steps, price) for placement in job.placements)
    if job.reference is None or not job.reference.sampled_tokens:
        return Verdict(prices, None)
    planned = price_steps(job.placements[0], recut(job.reference.sampled, steps), price)
    return Verdict(prices, planned, job.seen.sampled_tokens / job.reference.sampled_tokens)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Do jobs until the source ends."""
    while len(head := source.read(_LENGTH.size)) == _LENGTH.size:
        job = pickle.loads(source.read(_LENGTH.unpack(head)[0]))
        answer: Any
        try:
            answer = do(job)
        except Exception as error:
            answer = Failure(f"{type(error).__name__}: {' '.join(str(error).split())}")
        told = pickle.dumps(answer, protocol=5)
        sink.write(_LENGTH.pack(len(told)) + told)
        sink.flush()


def main() -> None:
    """Serve standard input; whatever prints goes to standard error."""
    lower([0])
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as sink:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
