"""Workers in processes of their own tell the first one which rows lack an expert."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experts.dispatch.workers.refusal_board import RefusalBoard, make_board
from experts.dispatch.workers.row_share import RowShare
from experts.protocol.errors import UnsupportedModelError
from experts.transports.shared_region import SharedRegion
from tests.support.small_mesh import SPAWN_S, forked_context
from tests.support.waiting import AWAIT_S

MAX_ROWS, STEPS = 100, 300


def rows_of_step(worker: int, step: int) -> np.ndarray | None:
    """What a worker refuses in a step: nothing at first, in every third step, and in some at random."""
    rng = np.random.default_rng([worker, step])
    num_rows = np.random.default_rng(step).integers(1, MAX_ROWS + 1)
    refused_T = rng.random(num_rows) < 0.1
    return refused_T if step % 3 and refused_T.any() else None


def work(worker: int, num_workers: int, may_post: list[Any], pipe: Any) -> None:
    """Process body: a worker's steps. `may_post[w]` is what the all-reduces do: no worker is two steps ahead of the
    first one's reading."""

    def gather(told: Any) -> list[Any]:
        pipe.send(told)
        answer: list[Any] = pipe.recv()
        return answer

    try:
        board = make_board(worker, num_workers, MAX_ROWS, AWAIT_S, gather)
    except UnsupportedModelError as error:
        pipe.send(str(error))
        return
    share = RowShare(worker, num_workers, board)
    unions = []
    for step in range(1, STEPS + 1):
        assert worker == 0 or may_post[worker].acquire(timeout=AWAIT_S)
        refused_T = rows_of_step(worker, step)
        share.end_step(step, refused_T)
        unions.append(share.refused_by_any(step, refused_T))
        if share.speaks:
            for one in may_post[1:]:
                one.release()
    pipe.send(unions)


def answers_of(num_workers: int, change: Callable[[list[Any]], list[Any]] = lambda told: told) -> list[Any]:
    """What each worker sends at the end; `change` is done to what they gathered."""
    context = forked_context()
    may_post = [context.Semaphore(2) for _ in range(num_workers)]
    running = []
    for worker in range(num_workers):
        ours, theirs = multiprocessing.Pipe()
        process = context.Process(target=work, args=(worker, num_workers, may_post, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        told = change([_receive(pipe) for _, pipe in running])
        for _, pipe in running:
            pipe.send(told)
        return [_receive(pipe) for _, pipe in running]
    finally:
        for process, pipe in running:
            process.kill()
            process.join(AWAIT_S)
            pipe.close()


def _receive(pipe: Any) -> Any:
    assert pipe.poll(SPAWN_S), "a worker sent nothing"
    return pipe.recv()


def test_the_first_worker_learns_of_all_refused_rows() -> None:
    first, *others = answers_of(3)
    assert all(unions == [None] * STEPS for unions in others), "only the first worker's output is heard"
    some = 0
    for step, union_T in enumerate(first, start=1):
        told = [refused_T for worker in range(3) if (refused_T := rows_of_step(worker, step)) is not None]
        some += bool(told)
        if told:
            assert np.array_equal(union_T, np.logical_or.reduce(told)), step
        else:
            assert union_T is None, step
    assert 0 < some < STEPS


def test_workers_on_two_hosts_are_refused() -> None:
    answers = answers_of(2, lambda told: [told[0], ("another host", told[1][1])])
    assert len(answers) == 2
    for answer in answers:
        assert "the workers of this engine are on 2 hosts, expected one" in answer


def boards(timeout_s: float) -> tuple[RefusalBoard, RefusalBoard]:
    region = SharedRegion.create(RefusalBoard.size(2, MAX_ROWS), "test")
    first, second = (RefusalBoard(region, worker, 2, MAX_ROWS, timeout_s) for worker in range(2))
    return first, second


def test_a_worker_that_does_not_finish_is_named() -> None:
    first, second = boards(0.05)
    second.post(6, None)
    assert first.union(6, None) is None
    with pytest.raises(TimeoutError, match=r"worker 1 .* step 7 within 0\.05 s .* last heard of at step 6"):
        first.union(7, None)


def test_a_worker_may_be_one_step_ahead() -> None:
    first, second = boards(AWAIT_S)
    second.post(1, np.array([True, False]))
    second.post(2, None)
    assert first.union(1, None).tolist() == [True, False]  # type: ignore[union-attr]
    assert first.union(2, None) is None
    second.post(3, None)
    assert first.union(3, np.array([False, True])).tolist() == [False, True]  # type: ignore[union-attr]


def test_steps_may_be_counted_past_the_word() -> None:
    first, second = boards(0.05)
    for step in ((1 << 32) - 1, 1 << 32, (1 << 32) + 1):
        second.post(step, np.array([step % 2 == 0]))
        assert first.union(step, None).tolist() == [step % 2 == 0]  # type: ignore[union-attr]


def test_a_step_of_too_many_rows_is_refused() -> None:
    _, second = boards(AWAIT_S)
    with pytest.raises(ValueError, match="a step of 101 rows, expected at most 100"):
        second.post(1, np.ones(MAX_ROWS + 1, np.bool_))
